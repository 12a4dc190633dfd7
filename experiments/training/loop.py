"""Trains a language model; killed at any moment, the same call goes on.

The batch of a step is a function of the step, everything else that a step
reads is in the checkpoint, and a row of metrics is written once per step: a
resumed run writes the rows that the uninterrupted one would have written.

Of several processes all make the same calls in the same order; process 0 alone
writes metrics, the report and the token store.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
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
from experiments.training import agreed_stop
from experiments.training import checkpoints as checkpoints_lib
from experiments.training import goodput as goodput_lib
from experiments.training import mesh as mesh_lib
from experiments.training import metrics as metrics_lib
from experiments.training import placement as placement_lib
from experiments.training import processes
from experiments.training import progress as progress_lib
from experiments.training import report as report_lib
from experiments.training import shutdown
from experiments.training import train_step
from experiments.training import watchdog as watchdog_lib
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

  def __init__(self, config, metrics, progress, goodput):
    self._run = config
    self._config = config.training
    self._metrics = metrics
    self._progress = progress
    self._goodput = goodput
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
    values |= self._goodput.add(values['seconds'])
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


@dataclasses.dataclass(frozen=True)
class _Run:
  """What stays the same while a run is executed."""

  config: config_lib.TrainLMConfig
  workdir: workdir_lib.Workdir
  store: token_store.TokenStore
  identity: dict[str, Any]
  group: processes.Group
  stop: agreed_stop.AgreedStop
  watchdog: watchdog_lib.Watchdog
  mesh: jax.sharding.Mesh
  placement: placement_lib.Placement
  first_start: float


def _restore(run: _Run, checkpoints) -> train_step.State:
  """Returns the newest saved state, or the initial one."""
  restored = checkpoints.restore(
    train_step.abstract_state(run.config, run.mesh)
  )
  if restored is None:
    return train_step.build_init(run.config, run.mesh)()
  logging.info('Resumed from the checkpoint of step %d', restored.step)
  return restored.state


def _open_outputs(run: _Run, start: int, stack: contextlib.ExitStack):
  """Returns metrics, progress and goodput of a run that goes on at a step."""
  if not run.group.is_primary:
    # It counts too, into the void: a step's log is the same code everywhere.
    return (
      metrics_lib.NoMetrics(),
      progress_lib.NoProgress(),
      goodput_lib.Goodput(run.first_start),
    )
  metrics = stack.enter_context(metrics_lib.MetricsWriter(run.workdir))
  metrics.truncate_after(start)
  progress = stack.enter_context(
    progress_lib.Progress(run.config.training.num_steps, run.workdir.log)
  )
  goodput = goodput_lib.Goodput(
    run.first_start,
    goodput_lib.productive_seconds(metrics_lib.read_rows(run.workdir.metrics)),
  )
  return metrics, progress, goodput


def _is_due(step: int, every: int, last: int) -> bool:
  return step > 0 and (step % every == 0 or step == last)


def _evaluate(run: _Run, state, step, metrics, progress) -> None:
  """Writes the evaluation of a step; the last one scores the whole split."""
  config = run.config
  last = step == config.training.num_steps
  result = held_out.evaluate(
    config.model,
    state['params'],
    run.store.split('validation'),
    config.evaluation,
    num_tokens=None if last else config.evaluation.num_tokens,
    placement=run.placement,
  )
  metrics.write('eval', step, result)
  progress.note(
    f'step {step:,}: validation bits/byte {result["bits_per_byte"]:.4f} '
    f'({result["tokens"]:,} tokens)'
  )


def _execute(run: _Run) -> train_step.State | None:
  """Runs the steps; returns the final state, None if asked to stop before."""
  config, last = run.config, run.config.training.num_steps
  num_rows = config.data.batch_size
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(
      checkpoints_lib.Checkpoints(
        run.workdir.checkpoints, config.checkpoint, run.group
      )
    )
    state = _restore(run, checkpoints)
    start = int(state['step'])
    metrics, progress, goodput = _open_outputs(run, start, stack)
    is_evaluated = run.group.share(
      'evaluated', lambda: metrics.has('eval', start)
    )
    shard_index, shard_count = run.placement.share(num_rows)
    batches = windows.training_iterator(
      run.store.split('train'),
      config.data,
      start_step=start,
      shard_index=shard_index,
      shard_count=shard_count,
    )
    stack.callback(batches.close)
    stack.enter_context(run.watchdog)
    stack.enter_context(jax.transfer_guard('disallow'))
    run_step = train_step.build(config, run.mesh)
    log = _StepLog(config, metrics, progress, goodput)
    run.stop.begin()
    for step in range(start, last + 1):
      run.watchdog.beat()
      stopping = run.stop.at(step)
      if stopping or _is_due(step, config.checkpoint.every_steps, last):
        log.flush()  # No step is in a checkpoint whose row is not on disk.
        metrics.sync()
        checkpoints.save(step, state, run.identity | {'data_position': step})
      if stopping:
        checkpoints.wait()
        progress.note(
          f'{run.stop.name}: step {step} is saved; the same command resumes'
        )
        return None
      is_due = _is_due(step, config.evaluation.every_steps, last)
      if is_due and not (step == start and is_evaluated):
        log.flush()
        _evaluate(run, state, step, metrics, progress)
        log.restart_clock()
      if step < last:
        batch = run.placement.put(next(batches), num_rows)
        state, values = run_step(state, batch)
        log.push(step + 1, values)
    return state


def _prepare(config, group, root, stop) -> token_store.TokenStore | str:
  """Returns the store that process 0 opens or builds, or why it stopped."""

  def prepare() -> str:
    try:
      preparation.prepare_store(config.data, root, stop=stop)
    except shutdown.ShutdownError as error:
      return str(error)
    return ''

  stopped = group.share('token store', prepare, meanwhile=lambda: stop.say(0))
  return stopped or preparation.open_store(config.data, root)


def _claim(workdir, identity, group) -> None:
  """Ties the directory to the run; checks that all processes are of it."""
  if group.is_primary:
    workdir_lib.claim(workdir, identity)
  first = json.loads(group.gather('identity', json.dumps(identity))[0])
  workdir_lib.require_same(first, identity)


def train(
  config: config_lib.TrainLMConfig,
  root: str | os.PathLike,
  *,
  group: processes.Group | None = None,
  watchdog_seconds: float = 0,
) -> str:
  """Trains, or goes on training, in a directory.

  Args:
    config: of the run; the same at every call for a directory.
    root: the directory of the run, which all processes see.
    group: the processes of the run; None: this one alone.
    watchdog_seconds: see `config.RuntimeConfig`.

  Returns:
    What to tell the person: the report of the finished run, or that it was
    interrupted.

  Raises:
    ValueError: the directory holds another run, or the data does not fit.
    checkpoints.CheckpointsDamagedError: no checkpoint of the run is whole.
    checkpoints.SaveFailedError: checkpoints could not be written.
    TrainingStoppedError: too many steps in a row were refused.
    processes.PeerLostError: another process is gone or silent.
  """
  group = group or processes.Group()
  with contextlib.ExitStack() as stack:
    if group.is_primary:
      stack.enter_context(workdir_lib.locked(root))
    workdir = workdir_lib.Workdir(pathlib.Path(root))
    request = stack.enter_context(shutdown.requested())
    stop = agreed_stop.AgreedStop(request, group)
    store = _prepare(config, group, workdir.root, stop)
    if isinstance(store, str):
      return f'interrupted\n{store}'
    _check_fit(config, store)
    identity = _identity(config, store)
    _claim(workdir, identity, group)
    report = group.share('report', lambda: report_lib.read(workdir))
    if report is not None:
      return f'already done\n{report_lib.describe(report, workdir)}'
    watchdog = watchdog_lib.Watchdog(watchdog_seconds, workdir.stacks)
    mesh = mesh_lib.build(config)
    placement = placement_lib.Placement(
      mesh_lib.batch_sharding(mesh), on_use=watchdog.beat
    )
    run = _Run(
      config,
      workdir,
      store,
      identity,
      group,
      stop,
      watchdog,
      mesh,
      placement,
      first_start=group.share(
        'clock', lambda: goodput_lib.first_start(workdir.clock)
      ),
    )
    state = _execute(run)
    if state is None:
      return 'interrupted'
    report = report_lib.write(
      config,
      state['params'],
      store,
      workdir,
      identity,
      group=group,
      placement=placement,
    )
    return report_lib.describe(report, workdir)
