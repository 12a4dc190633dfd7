"""Sealed, asynchronous checkpoints that fall back past a damaged one.

The train state and its metadata (step, data position, fingerprints, ...) are
published together, by one rename (`step_directories`).

Reading changes nothing on the disk, so another program may read while a run
writes. A `save` first removes what killed and failed ones left, and moves the
checkpoints that `restore` found damaged to `<step>.damaged`.

Of several processes each writes its part of the arrays and digests its share of
the files; process 0 seals and publishes when all have said that they are done.
What one of them finds out (a failure, a damaged file) counts for all, so they
stay in step. Any number of processes and any mesh may restore.

Nothing in a checkpoint is loaded as code: it is JSON and compressed arrays.
"""

import concurrent.futures
import json
import logging as python_logging
import os
from typing import Any, NamedTuple, Self

from absl import logging
import jax
from orbax.checkpoint import v1 as ocp

from experiments import config as config_lib
from experiments.training import leaves
from experiments.training import processes
from experiments.training import seals
from experiments.training import step_directories

# What orbax, tensorstore and the file system raise when a write fails.
_WRITE_ERRORS = (OSError, ValueError, RuntimeError)


class SaveFailedError(RuntimeError):
  """Checkpoints cannot be written."""


class CheckpointsDamagedError(RuntimeError):
  """Checkpoints are there and none of them is whole."""


class Restored(NamedTuple):
  """What `Checkpoints.restore` returns.

  Attributes:
    step: the step it was saved at.
    state: the pytree of arrays.
    meta: the nested dict of JSON values.
  """

  step: int
  state: Any
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, in one directory.

  Use it as a context manager: leaving the block without an error waits for the
  last save and raises if that failed. All processes of the run make the same
  calls.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    config: config_lib.CheckpointConfig,
    group: processes.Group | None = None,
  ):
    self._group = group or processes.Group()
    self._share = (self._group.index, self._group.count)
    self._files = step_directories.StepDirectories(directory)
    self._config = config
    self._executor = concurrent.futures.ThreadPoolExecutor(
      max_workers=1, thread_name_prefix='checkpoints'
    )
    self._pending: tuple[int, concurrent.futures.Future] | None = None
    self._errors: list[Exception] = []  # Of the failed saves in a row.
    self._current: int | None = None  # The step last restored or saved.
    self._damaged: dict[int, str] = {}
    # Orbax explains one failed write in hundreds of lines; ours is one line.
    logging.get_absl_logger().addFilter(_is_not_from_orbax)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, error_type, error, traceback) -> None:
    try:
      if error_type is None:
        self.wait()
    finally:
      self.close()

  def save(self, step: int, state: Any, meta: dict[str, Any]) -> bool:
    """Starts to save; the state may be donated as soon as this returns.

    The arrays are copied to the host before it returns, the files are written
    by a thread. A save still under way is waited for first. A write that fails
    (disk full, directory read-only) is one warning, not an exception.

    Args:
      step: greater than that of every checkpoint in the directory.
      state: pytree of jax arrays (dicts, tuples, NamedTuples; typed PRNG keys).
      meta: nested dict of JSON values.

    Returns:
      True when the save has begun; False when it failed at once, or when this
      very step is the one last restored or saved.

    Raises:
      ValueError: the step is not above those present, `state` has a leaf that
        is not an array, or `meta` is not JSON.
      SaveFailedError: `config.max_failed_saves` saves in a row have failed.
    """
    metadata = {'leaves': leaves.describe(state), 'meta': _json_copy(meta)}
    self._join()
    self._raise_if_hopeless()
    if step == self._current:
      return False
    self._require_new_step(step)
    try:
      self._make_room(step)
      response = self._write(step, state, metadata)
    except OSError as error:
      self._give_up(step, error)
      self._errors.append(error)
      self._raise_if_hopeless()
      return False
    future = self._executor.submit(self._finish, step, response)
    self._pending = (step, future)
    return True

  def restore(self, abstract_state: Any) -> Restored | None:
    """Loads the newest checkpoint whose seal verifies.

    Each newer one that does not verify is named in one warning. A leaf of
    `abstract_state` without a sharding goes to the first local device.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct`, of the saved structure.

    Returns:
      The step, the state and the metadata; None when there is no checkpoint.

    Raises:
      CheckpointsDamagedError: there are checkpoints, all of them damaged.
      ValueError: a leaf is missing, is new, or has another shape or dtype; or
        has no sharding, where there are several processes.
    """
    step = self._newest_whole()
    if step is None:
      return None
    path = self._files.path(step)
    metadata = ocp.metadata(path, 'state').custom_metadata
    leaves.require_same(
      path, metadata['leaves'], leaves.describe(abstract_state)
    )
    placed = jax.tree.map(leaves.placed, abstract_state)
    state = ocp.load_checkpointables(path, {'state': placed})['state']
    self._current = step
    return Restored(step, state, metadata['meta'])

  def read_meta(self) -> dict[str, Any] | None:
    """Returns the metadata that `restore` would; reads no array.

    Raises:
      CheckpointsDamagedError: there are checkpoints, all of them damaged.
    """
    step = self._newest_whole()
    if step is None:
      return None
    return ocp.metadata(self._files.path(step), 'state').custom_metadata['meta']

  def wait(self) -> None:
    """Blocks until the save under way is on the disk.

    Raises:
      SaveFailedError: the last save failed.
    """
    self._join()
    if self._errors:
      raise SaveFailedError(
        f'the last save to {self._files.root} failed: '
        f'{_one_line(self._errors[-1])}'
      ) from self._errors[-1]

  def close(self) -> None:
    """Ends the writing thread after the save under way; raises nothing."""
    self._join()
    self._executor.shutdown()
    if self._errors and self._group.is_primary:
      # Of a failed save, orbax's threads write on for a moment.
      self._files.remove_leftovers()

  def _newest_whole(self) -> int | None:
    self._join()
    for step in self._group.share('steps', self._files.steps):
      own = self._files.damage(step, share=self._share)
      found = self._group.gather('damage', own or '')
      problem = next((text for text in found if text), None)
      if problem is None:
        return step
      if self._group.count == 1 and not self._files.path(step).is_dir():
        continue  # The run that owns the directory has just deleted it.
      if step not in self._damaged:
        logging.warning('checkpoint %d is damaged: %s', step, problem)
      self._damaged[step] = problem
    lines = [f'{step}: {problem}' for step, problem in self._damaged.items()]
    lines += self._files.names_kept_aside()
    if not lines:
      return None
    raise CheckpointsDamagedError(
      f'no checkpoint in {self._files.root} is whole ({"; ".join(lines)}); '
      'move them away to start from the beginning'
    )

  def _require_new_step(self, step: int) -> None:
    if not self._group.is_primary:
      return
    known = [s for s in self._files.steps() if s not in self._damaged]
    if step < 0 or (known and step <= known[0]):
      raise ValueError(
        f'a new step must be at least 0 and above {known[:1]}, the newest in '
        f'{self._files.root}, got {step}: restore first, or use another '
        'directory'
      )

  def _make_room(self, step: int) -> None:
    """Removes leftovers and moves damaged checkpoints aside.

    Raises:
      OSError: process 0 cannot write to the directory.
    """
    problem = ''
    if self._group.is_primary:
      try:
        self._files.make_room(step, self._damaged)
      except OSError as error:
        problem = _one_line(error)
    # None begins to write what another would have to wait for in vain.
    problem = self._group.gather('room', problem)[0]
    if problem:
      raise OSError(problem)
    self._damaged.clear()

  def _write(
    self, step: int, state: Any, metadata: dict[str, Any]
  ) -> ocp.AsyncResponse:
    # Created by orbax's thread, a directory that cannot be created would be
    # waited for until a timeout instead of being an error.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    # Among processes, orbax compares the paths by a collective of its own.
    with ocp.Context(async_options=options), jax.transfer_guard('allow'):
      return ocp.save_checkpointables_async(
        self._files.writing_path(step),
        {'state': state},
        overwrite=True,
        custom_metadata=metadata,
      )

  def _finish(self, step: int, response: ocp.AsyncResponse) -> Exception | None:
    """Waits for orbax, seals, publishes; returns the error of a failure."""
    try:
      response.result()
      files = seals.digests(self._files.writing_path(step), share=self._share)
      own: Exception | None = None
    except _WRITE_ERRORS as error:
      files, own = {}, error
    try:
      files = self._agree('written', files, own)
      own = self._publish(step, files)
      self._agree('published', {}, own)
    except _WRITE_ERRORS as error:
      self._give_up(step, error)
      return error
    if self._group.is_primary:
      self._files.delete_old(self._config)
    return None

  def _publish(self, step: int, files: dict[str, Any]) -> OSError | None:
    if not self._group.is_primary:
      return None
    try:
      self._files.publish(step, files)
    except OSError as error:
      return error
    return None

  def _agree(
    self, name: str, part: dict[str, Any], own: Exception | None
  ) -> dict[str, Any]:
    """Returns the parts of all processes put together.

    Raises:
      The error of this process if it has one.
      OSError: another process has one.
    """
    said = {'error': _one_line(own) if own else '', 'part': part}
    union: dict[str, Any] = {}
    errors = []
    for text in self._group.gather(f'save {name}', json.dumps(said)):
      given = json.loads(text)
      union |= given['part']
      errors += [given['error']] if given['error'] else []
    if own is not None:
      raise own
    if errors:
      raise OSError(errors[0])
    return union

  def _give_up(self, step: int, error: Exception) -> None:
    if not self._group.is_primary:
      return
    logging.warning(
      'saving checkpoint %d failed, the run goes on: %s', step, _one_line(error)
    )
    self._files.remove_leftovers()

  def _join(self) -> None:
    """Waits for the save under way and takes note of how it ended."""
    if self._pending is None:
      return
    step, future = self._pending
    self._pending = None
    error = future.result()
    if error is None:
      self._current = step
      self._errors.clear()
    else:
      self._errors.append(error)

  def _raise_if_hopeless(self) -> None:
    if len(self._errors) >= self._config.max_failed_saves:
      raise SaveFailedError(
        f'{len(self._errors)} saves in a row to {self._files.root} failed '
        f'(checkpoint.max_failed_saves), the last: '
        f'{_one_line(self._errors[-1])}'
      ) from self._errors[-1]


def _is_not_from_orbax(record: python_logging.LogRecord) -> bool:
  """A logging filter: errors of orbax reach us as exceptions anyway."""
  return '/orbax/checkpoint/' not in record.pathname.replace(os.sep, '/')


def _one_line(error: Exception) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())


def _json_copy(meta: dict[str, Any]) -> dict[str, Any]:
  try:
    copy = json.loads(json.dumps(meta, allow_nan=False))
  except (TypeError, ValueError) as error:
    raise ValueError(f'meta must hold JSON values only: {error}') from error
  if copy != meta:
    raise ValueError(
      'meta must hold JSON values only (lists, no tuples; string keys), got '
      f'{meta!r}'
    )
  return copy
