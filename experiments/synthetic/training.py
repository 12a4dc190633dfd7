"""Trains runs that differ in learning rate, weight decay and seed together.

An epoch is one call: a scan over batches that lie on the device, vectorised
over the runs. What a run computes depends on no other run of its group.
"""

from collections.abc import Callable, Sequence
import dataclasses
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.synthetic import config as config_lib
from experiments.synthetic import group_checkpoint
from experiments.synthetic import metrics
from experiments.synthetic import model
from experiments.synthetic import optimizer
from experiments.synthetic import task as task_lib
from experiments.synthetic import tasks

# Seeds of the examples, from that of the run on.
_TEST, _VALIDATION, _FRESH = 1, 2, 1000


class Data(NamedTuple):
  """Examples with the positions that are scored, padded by position 0.

  Attributes:
    examples: as generated.
    at: int32 [N, S], the scored positions of every example; None: all T.
    targets: int32 [N, S], at these positions.
  """

  examples: task_lib.Examples
  at: np.ndarray | None
  targets: np.ndarray


@dataclasses.dataclass
class History:
  """What a run reached, epoch by epoch.

  Attributes:
    loss: mean of the selection set, nats per target.
    accuracy: of the selection set, by the metric of the configuration.
    test: all accuracies of the test set.
    by_position: see `metrics.by_position`; of the test set.
    training_loss: mean over the epoch, nats per target.
    seconds: of the group, until the end of the epoch.
  """

  loss: list[float] = dataclasses.field(default_factory=list)
  accuracy: list[float] = dataclasses.field(default_factory=list)
  test: list[dict[str, float]] = dataclasses.field(default_factory=list)
  by_position: list[list[dict[str, float]]] = dataclasses.field(
    default_factory=list
  )
  training_loss: list[float] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)


def gather_scored(examples: task_lib.Examples) -> Data:
  """Returns the examples with their scored positions in front.

  Where more than half of a row may be scored, nothing is gathered.
  """
  scored = examples.targets != task_lib.IGNORED
  most = int(scored.sum(axis=1).max())
  if 2 * most > scored.shape[1]:
    return Data(examples, None, examples.targets)
  at = np.argsort(~scored, axis=1, kind='stable')[:, :most].astype(np.int32)
  targets = np.take_along_axis(examples.targets, at, axis=1)
  return Data(examples, at, targets)


def _cross_entropy(logits, targets):
  """Returns (sum of nats, number) of the targets that are not ignored."""
  scored = targets != task_lib.IGNORED
  log_p = jax.nn.log_softmax(logits)
  picked = jnp.take_along_axis(
    log_p, jnp.where(scored, targets, 0)[..., None], axis=-1
  )[..., 0]
  return -jnp.sum(jnp.where(scored, picked, 0)), jnp.sum(scored)


def _over_runs(function: Callable, num_runs: int, num_stacked: int) -> Callable:
  """Vectorises over the leading axis of the first `num_stacked` arguments.

  One run is computed as it is: a batched product of batch 1 is slower on CPU.
  """

  def call(*arguments):
    stacked, shared = arguments[:num_stacked], arguments[num_stacked:]
    if num_runs > 1:
      axes = (0,) * num_stacked + (None,) * len(shared)
      return jax.vmap(function, in_axes=axes)(*arguments)
    single = jax.tree.map(lambda x: x[0], stacked)
    result = function(*single, *shared)
    return jax.tree.map(lambda x: x[None], result)

  return call


def _build_epoch(run: config_lib.RunConfig, num_runs: int) -> Callable:
  """Returns epoch(states, order, inputs, at, targets) -> (states, losses)."""

  def loss(params, key, inputs, at, targets):
    logits = model.apply(run, params, inputs, at=at, dropout_key=key)
    total, count = _cross_entropy(logits, targets)
    return total / jnp.maximum(count, 1)

  def epoch(state, order, inputs, at, targets):
    def step(state, rows):
      key = jax.random.fold_in(state.key, state.step)
      value, gradients = jax.value_and_grad(loss)(
        state.params,
        key,
        inputs[rows],
        None if at is None else at[rows],
        targets[rows],
      )
      return optimizer.update(run.training, state, gradients), value

    state, values = jax.lax.scan(step, state, order)
    return state, jnp.mean(values)

  return jax.jit(_over_runs(epoch, num_runs, 1), donate_argnums=0)


def _build_predict(run: config_lib.RunConfig, num_runs: int) -> Callable:
  """Returns predict(params, inputs, at, targets) -> (tokens, nats, count)."""

  def predict(params, inputs, at, targets):
    logits = model.apply(run, params, inputs, at=at)
    nats, count = _cross_entropy(logits, targets)
    return jnp.argmax(logits, axis=-1), nats, count

  return jax.jit(_over_runs(predict, num_runs, 1))


def _predict_all(predict, params, data: Data, batch_size: int):
  """Returns tokens [R, N, T], int, and the loss [R], nats per target."""
  tokens, nats, count = [], 0.0, 0
  for start in range(0, len(data.targets), batch_size):
    part = slice(start, start + batch_size)
    at = None if data.at is None else data.at[part]
    got, total, number = predict(
      params, data.examples.inputs[part], at, data.targets[part]
    )
    tokens.append(np.asarray(got))
    nats, count = nats + np.asarray(total), count + np.asarray(number)
  found = np.concatenate(tokens, axis=1)  # [R, N, S]
  if data.at is None:
    return found, nats / count
  whole = np.full((len(found), *data.examples.targets.shape), task_lib.IGNORED)
  rows = np.arange(found.shape[1])[:, None]
  # The padding of `at` is of positions without target, which are not read.
  whole[:, rows, data.at] = found
  return whole, nats / count


def _initial_states(runs: Sequence[config_lib.RunConfig]):
  """Returns the states of the runs, stacked."""

  def build(seed, learning_rate, weight_decay):
    params_key, dropout_key = jax.random.split(jax.random.key(seed))
    return optimizer.init(
      runs[0].training,
      model.init(runs[0], params_key),
      key=dropout_key,
      learning_rate=learning_rate,
      weight_decay=weight_decay,
    )

  build = jax.jit(build)
  states = [
    build(
      run.training.seed,
      np.float32(run.training.learning_rate),
      np.float32(run.training.weight_decay),
    )
    for run in runs
  ]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def _generate(task: Any, num_examples: int, seed: int) -> Data:
  generate = tasks.generator(task)
  return gather_scored(generate(task, num_examples=num_examples, seed=seed))


def _order(training: config_lib.TrainingConfig, epoch: int) -> np.ndarray:
  """Returns the rows of every batch of an epoch, int32 [steps, batch]."""
  size = training.steps_per_epoch * training.batch_size
  rows = np.arange(training.num_train, dtype=np.int32)
  if training.shuffle:
    rows = np.random.default_rng((training.data_seed, epoch)).permutation(rows)
  return rows[:size].reshape(-1, training.batch_size)


def _is_over(history: History, training: config_lib.TrainingConfig) -> bool:
  return bool(
    history.accuracy and history.accuracy[-1] >= training.stop_accuracy
  )


def check_group(runs: Sequence[config_lib.RunConfig]) -> None:
  """Raises ValueError unless the runs differ in `config.VARIED` alone."""
  if len({config_lib.group_key(run) for run in runs}) != 1:
    raise ValueError(
      f'runs trained together may differ in {", ".join(config_lib.VARIED)} '
      f'alone, got {len(runs)} runs that differ otherwise, or none'
    )


class _Evaluation:
  """The test and selection sets, and how runs do on them."""

  def __init__(self, run: config_lib.RunConfig, num_runs: int):
    training = run.training
    self._run = run
    self._predict = _build_predict(run, num_runs)
    number, seed = training.num_test, training.data_seed
    self._test = _generate(run.test_task, number, seed + _TEST)
    self._validation = None
    if run.protocol == 'clean':
      self._validation = _generate(run.test_task, number, seed + _VALIDATION)

  def _on(self, params, data: Data):
    return _predict_all(
      self._predict, params, data, self._run.training.batch_size
    )

  def record(self, params, histories: Sequence[History]) -> None:
    """Appends an epoch to the histories of the runs that go on."""
    training = self._run.training
    tokens, loss = self._on(params, self._test)
    chosen_by = tokens, loss, self._test
    if self._validation is not None:
      chosen_by = *self._on(params, self._validation), self._validation
    for i, history in enumerate(histories):
      if _is_over(history, training):
        continue
      selection = metrics.accuracies(chosen_by[0][i], chosen_by[2].examples)
      history.loss.append(float(chosen_by[1][i]))
      history.accuracy.append(selection[training.metric])
      history.test.append(metrics.accuracies(tokens[i], self._test.examples))
      history.by_position.append(
        metrics.by_position(tokens[i], self._test.examples)
      )


def _begin(runs, checkpoint):
  """Returns states and histories: new ones, or those of the checkpoint."""
  states = _initial_states(runs)
  found = checkpoint and group_checkpoint.load(checkpoint, runs, states)
  if not found:
    return states, [History() for _ in runs]
  states, histories = found
  return states, [History(**fields) for fields in histories]


def train(
  runs: Sequence[config_lib.RunConfig],
  *,
  checkpoint: str | os.PathLike | None = None,
  on_epoch: Callable[[int, Sequence[History]], None] = lambda *_: None,
) -> list[History]:
  """Trains runs that differ in `config.VARIED` alone; one history each.

  A run whose accuracy reached `stop_accuracy` is over: its history ends there,
  whatever the others of the group still do.

  Args:
    runs: at least one.
    checkpoint: a file that is replaced after every epoch. Where it exists,
      training goes on from it, bit for bit as if it had never stopped.
    on_epoch: called with the number of epochs done and the histories so far.

  Raises:
    ValueError: the runs differ otherwise, the sizes do not fit the task, or
      the checkpoint is damaged or of other runs.
  """
  check_group(runs)
  run, training = runs[0], runs[0].training
  evaluation = _Evaluation(run, len(runs))
  epoch_fn = _build_epoch(run, len(runs))
  states, histories = _begin(runs, checkpoint)
  first = max(len(history.loss) for history in histories)
  before = max((h.seconds[-1] for h in histories if h.seconds), default=0.0)
  begin, data = time.perf_counter() - before, None
  for epoch in range(first, training.num_epochs):
    if all(_is_over(history, training) for history in histories):
      break
    if data is None or training.fresh_data:
      seed = training.data_seed + (training.fresh_data * (_FRESH + epoch))
      made = _generate(run.task, training.num_train, seed)
      data = jax.device_put((made.examples.inputs, made.at, made.targets))
    states, losses = epoch_fn(states, _order(training, epoch), *data)
    going = [h for h in histories if not _is_over(h, training)]
    for history, loss in zip(histories, np.asarray(losses), strict=True):
      if not _is_over(history, training):
        history.training_loss.append(float(loss))
    evaluation.record(states.params, histories)
    for history in going:
      history.seconds.append(time.perf_counter() - begin)
    if checkpoint:
      group_checkpoint.save(checkpoint, runs, states, histories)
    on_epoch(epoch + 1, histories)
  return histories
