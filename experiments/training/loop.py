"""Trains a language model; killed at any moment, the same call goes on.

The batch of a step is a function of the step, everything else that a step
reads is in the checkpoint, and a row of metrics is written once per step: a
resumed run writes the rows that the uninterrupted one would have written.
"""

import contextlib
import time
from typing import Any

from absl import logging
import jax

from experiments import config as config_lib
from experiments import environment
from experiments import model_flops
from experiments.data import preparation
from experiments.data import token_store
from experiments.data import windows
from experiments.evaluation import held_out
from experiments.training import checkpoints as checkpoints_lib
from experiments.training import metrics as metrics_lib
from experiments.training import progress as progress_lib
from experiments.training import report as report_lib
from experiments.training import shutdown
from experiments.training import train_step
from experiments.training import workdir as workdir_lib


class TrainingStoppedError(RuntimeError):
  """Too many steps in a row were refused."""


def _identity(config, store: token_store.TokenStore) -> dict[str, Any]:
  """Returns what ties a directory to a run; saved with each checkpoint."""
  return {
    'config': config_lib.to_dict(config),
    'corpus': store.fingerprint,
    'tokenizer': store.meta.tokenizer_fingerprint,
    'versions': environment.versions(),
    'commit': environment.commit(),
    'device': environment.devices(),
  }


def _check_fit(config, store: token_store.TokenStore) -> None:
  """Refuses what could only fail later, before the directory is tied to it.

  Raises:
    ValueError: a split has no text, the vocabulary is too small, or model and
      optimizer cannot be built from the config.
  """
  for name, split in store.meta.splits.items():
    if split.num_tokens == split.num_documents:
      raise ValueError(
        f'no text is in the split {name!r}: give more documents or change '
        f'data.held_out_modulus, now {store.meta.held_out_modulus}'
      )
  if config.model.vocab_size < store.meta.vocab_size:
    raise ValueError(
      f'model.vocab_size must be at least {store.meta.vocab_size}, that of the '
      f'tokenizer {store.meta.tokenizer!r}, got {config.model.vocab_size}'
    )
  state = jax.eval_shape(lambda: train_step.init_state(config))
  shape = (config.data.batch_size, config.data.sequence_length + 1)
  window = jax.ShapeDtypeStruct(shape, 'int32')
  batch = {'tokens': window, 'segment_ids': window}
  jax.eval_shape(train_step.build(config), state, batch)


class _StepLog:
  """Writes the metrics of a step while the device works on the next one."""

  def __init__(self, config, metrics, progress):
    self._run = config
    self._config = config.training
    self._metrics = metrics
    self._progress = progress
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._time = time.monotonic()
    self._shown = (0.0, 0.0)  # Tokens and seconds since the last shown line.

  def push(self, step: int, values: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step and writes those of the one before."""
    self.flush()
    self._pending = (step, values)

  def flush(self) -> None:
    """Writes what is pending.

    Raises:
      TrainingStoppedError: `max_bad_steps` steps in a row were refused.
    """
    if self._pending is None:
      return
    step, values = self._pending
    self._pending = None
    values = {name: x.item() for name, x in jax.device_get(values).items()}
    now = time.monotonic()
    values['seconds'], self._time = now - self._time, now
    speed = values['tokens'] / max(values['seconds'], 1e-9)
    share = model_flops.mfu(self._run, speed, jax.devices())
    values |= {} if share is None else {'mfu': share}
    self._metrics.write('train', step, values)
    self._show(step, values)
    self._refuse(step, values)

  def restart_clock(self) -> None:
    """Leaves the time since the last row out of the speed."""
    self._time = time.monotonic()

  def _show(self, step, values):
    tokens, seconds = self._shown
    self._shown = (tokens + values['tokens'], seconds + values['seconds'])
    if step != 1 and step % self._config.log_every_steps:
      return
    tokens, seconds = self._shown
    self._shown = (0.0, 0.0)
    self._progress.update(
      step, loss=values['loss'], tokens_per_second=tokens / seconds
    )

  def _refuse(self, step, values):
    in_a_row = values['refused_in_a_row']
    if not in_a_row:
      return
    self._progress.note(
      f'step {step} not applied ({in_a_row} in a row): loss '
      f'{values["loss"]:.4g}, gradient norm {values["gradient_norm"]:.4g}'
    )
    if in_a_row >= self._config.max_bad_steps:
      raise TrainingStoppedError(
        f'{in_a_row} steps in a row up to step {step} were not finite or far '
        'above the ones before (training.max_bad_steps); the last checkpoint '
        'is from before: lower optimizer.peak_learning_rate, or look at the '
        'data of these steps'
      )


def _restore(config, checkpoints) -> train_step.State:
  """Returns the newest saved state, or the initial one."""
  init = jax.jit(lambda: train_step.init_state(config))
  restored = checkpoints.restore(jax.eval_shape(init))
  if restored is None:
    return init()
  logging.info('Resumed from the checkpoint of step %d', restored.step)
  return restored.state


def _is_due(step: int, every: int, last: int) -> bool:
  return step > 0 and (step % every == 0 or step == last)


def _evaluate(config, state, step, split, metrics, progress) -> None:
  """Writes the evaluation of a step; the last one scores the whole split."""
  last = step == config.training.num_steps
  result = held_out.evaluate(
    config.model,
    state['params'],
    split,
    config.evaluation,
    num_tokens=None if last else config.evaluation.num_tokens,
  )
  metrics.write('eval', step, result)
  progress.note(
    f'step {step:,}: validation bits/byte {result["bits_per_byte"]:.4f} '
    f'({result["tokens"]:,} tokens)'
  )


def _run(config, workdir, store, identity, stop) -> train_step.State | None:
  """Runs the steps; returns the final state, None if asked to stop before."""
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      checkpoints_lib.Checkpoints(workdir.checkpoints, config.checkpoint)
    )
    state = _restore(config, checkpoints)
    start, last = int(state['step']), config.training.num_steps
    metrics = stack.enter_context(metrics_lib.MetricsWriter(workdir))
    metrics.truncate_after(start)
    progress = stack.enter_context(progress_lib.Progress(last, workdir.log))
    batches = windows.training_iterator(
      store.split('train'), config.data, start_step=start
    )
    stack.callback(batches.close)
    stack.enter_context(jax.transfer_guard('disallow'))
    run_step = train_step.build(config)
    log = _StepLog(config, metrics, progress)
    for step in range(start, last + 1):
      stopping = bool(stop)  # Read once: the signal may come at any moment.
      if stopping or _is_due(step, config.checkpoint.every_steps, last):
        log.flush()  # No step is in a checkpoint whose row is not on disk.
        metrics.sync()
        checkpoints.save(step, state, identity | {'data_position': step})
      if stopping:
        checkpoints.wait()
        progress.note(
          f'{stop.name}: step {step} is saved; the same command resumes'
        )
        return None
      is_due = _is_due(step, config.evaluation.every_steps, last)
      if is_due and not metrics.has('eval', step):
        log.flush()
        split = store.split('validation')
        _evaluate(config, state, step, split, metrics, progress)
        log.restart_clock()
      if step < last:
        state, values = run_step(state, jax.device_put(next(batches)))
        log.push(step + 1, values)
    return state


def train(config: config_lib.TrainLMConfig, root: str) -> str:
  """Trains, or goes on training, in a directory.

  Args:
    config: of the run; the same at every call for a directory.
    root: the directory of the run.

  Returns:
    What to tell the person: the report of the finished run, or that it was
    interrupted.

  Raises:
    ValueError: the directory holds another run, or the data does not fit.
    checkpoints.CheckpointsDamagedError: no checkpoint of the run is whole.
    checkpoints.SaveFailedError: checkpoints could not be written.
    TrainingStoppedError: too many steps in a row were refused.
  """
  with workdir_lib.locked(root) as workdir, shutdown.requested() as stop:
    try:
      store = preparation.prepare_store(config.data, workdir.root, stop=stop)
    except shutdown.ShutdownError as error:
      return f'interrupted\n{error}'
    _check_fit(config, store)
    identity = _identity(config, store)
    workdir_lib.claim(workdir, identity)
    report = report_lib.read(workdir)
    if report is not None:
      return f'already done\n{report_lib.describe(report, workdir)}'
    state = _run(config, workdir, store, identity, stop)
    if state is None:
      return 'interrupted'
    report = report_lib.write(config, state['params'], store, workdir, identity)
    return report_lib.describe(report, workdir)
