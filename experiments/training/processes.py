"""The processes of a run: how they find each other, agree, wait and end.

One process needs none of this. Several join JAX's coordination service; what
they tell each other beyond collectives are short strings in its key-value
store. Every wait has a timeout and names the processes it waited for.

A process that loses a peer cannot go on. It ends with `restart.EXIT_CODE`, as
one that hangs does: the same command, started again for all, resumes.
"""

from collections.abc import Callable, Iterator
import contextlib
import json
import os
import pathlib
import re
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax._src import distributed  # The key-value store has no public name.

from experiments import config as config_lib
from experiments.training import native_log
from experiments.training import restart

_SLICE = 500  # Milliseconds between looks at other things while waiting.
_HEARTBEAT = 100  # Seconds of silence until a process counts as dead.
_FAREWELL = 2  # Seconds in which the others can read why process 0 ends.
_FAILED = 'failed'
_LOST_PEER = re.compile(
  r'gloo|nccl|coordination service|heartbeat|connection (reset|closed|refused)'
  r'|socket closed',
  re.IGNORECASE,
)


class PeerLostError(RuntimeError):
  """Another process of the run is gone or silent."""


class PeerFailedError(RuntimeError):
  """Another process of the run ended with an error that would come again."""


class Group:
  """The processes of a run, seen from one of them.

  Attributes:
    index: number of this process.
    count: how many there are.
    timeout: seconds that others may take to answer.
  """

  def __init__(self, *, index: int = 0, count: int = 1, timeout: float = 300):
    self.index = index
    self.count = count
    self.timeout = timeout
    self._rounds: dict[str, int] = {}
    self._lock = threading.Lock()

  @property
  def is_primary(self) -> bool:
    """Whether this process writes what only one may write."""
    return self.index == 0

  def gather(self, name: str, value: str = '') -> list[str]:
    """Returns the value that each process gives, in their order.

    All processes call it equally often for a name. It is a barrier.

    Raises:
      PeerLostError: processes give nothing in time; names them.
      PeerFailedError: one has failed.
    """
    if self.count == 1:
      return [value]
    key, old = self._next_round(name)
    client().key_value_set(f'{key}/{self.index}', value)
    values = []
    for peer in range(self.count):
      found = self._wait(f'{key}/{peer}')
      if found is None:
        raise PeerLostError(self._describe_missing(name, key))
      values.append(found)
    if old:  # Who is in this round has read all of the one before the last.
      client().key_value_delete(f'{old}/{self.index}')
    return values

  def share(
    self,
    name: str,
    make: Callable[[], Any],
    *,
    meanwhile: Callable[[], None] = lambda: None,
  ) -> Any:
    """Returns what `make` returns in process 0, a JSON value, in all.

    Process 0 may take as long as it shows life by `show_life`.

    Args:
      name: of the value; all processes share it equally often.
      make: called in process 0 only.
      meanwhile: called about twice a second where process 0 is waited for.

    Raises:
      PeerLostError: process 0 shows no life for the timeout.
      PeerFailedError: a process has failed.
    """
    if self.count == 1:
      return make()
    key, _ = self._next_round(name)
    if self.is_primary:
      value = make()
      client().key_value_set(key, json.dumps(value))
      return value
    life = None
    while (text := self._wait(key, meanwhile)) is None:
      last, life = life, try_get('life')
      if life == last:
        raise PeerLostError(
          f'process 0 was waited for {self.timeout:g} s to finish {name!r} '
          '(--peer_timeout_seconds)'
        )
    return json.loads(text)

  def show_life(self) -> None:
    """Tells those that wait for process 0 that it is at work."""
    if self.count > 1 and self.is_primary:
      client().key_value_set('life', str(time.time()), allow_overwrite=True)

  def _next_round(self, name: str) -> tuple[str, str]:
    """Returns the key of this use of a name, and that of two uses before."""
    with self._lock:
      number = self._rounds.get(name, 0)
      self._rounds[name] = number + 1
    return f'{name}/{number}', f'{name}/{number - 2}' if number > 1 else ''

  def _wait(
    self, key: str, meanwhile: Callable[[], None] = lambda: None
  ) -> str | None:
    """Returns the value of a key; None if it does not appear in time."""
    deadline = time.monotonic() + self.timeout
    while True:
      try:
        return client().blocking_key_value_get(key, _SLICE)
      except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
          raise
      meanwhile()
      if (failure := try_get(_FAILED)) is not None:
        raise PeerFailedError(failure)
      if time.monotonic() > deadline:
        return None

  def _describe_missing(self, name: str, key: str) -> str:
    here = {
      int(found.rpartition('/')[2])
      for found, _ in client().key_value_dir_get(f'{key}/')
    }
    missing = sorted(set(range(self.count)) - here)
    return (
      f'of {self.count} processes {", ".join(map(str, missing))} did not come '
      f'to {name!r} within {self.timeout:g} s (--peer_timeout_seconds)'
    )


def client() -> Any:
  """Returns the client of the coordination service of several processes."""
  return distributed.global_state.client


def try_get(key: str) -> str | None:
  """Returns the value of a key, or None while it has none."""
  try:
    return client().key_value_try_get(key)
  except jax.errors.JaxRuntimeError as error:
    if 'NOT_FOUND' in str(error):
      return None
    raise


def set_once(key: str, value: str) -> None:
  """Gives a key a value unless it has one."""
  try:
    client().key_value_set(key, value)
  except jax.errors.JaxRuntimeError as error:
    if 'ALREADY_EXISTS' not in str(error):
      raise


def _initialize(config: config_lib.RuntimeConfig) -> None:
  """Joins the coordination service, if there are several processes.

  Raises:
    ValueError: some of what it needs is given, and the rest is not found.
  """
  # SIGTERM is handled here, see `agreement`.
  jax.config.update('jax_enable_preemption_service', False)
  given = (
    config.coordinator_address,
    config.num_processes,
    config.process_id >= 0,
  )
  try:
    jax.distributed.initialize(
      coordinator_address=config.coordinator_address or None,
      num_processes=config.num_processes or None,
      process_id=config.process_id if config.process_id >= 0 else None,
      cluster_detection_method='deactivate' if all(given) else None,
      initialization_timeout=config.peer_timeout_seconds,
      heartbeat_timeout_seconds=min(_HEARTBEAT, config.peer_timeout_seconds),
    )
  except ValueError as error:
    if any(given):
      raise ValueError(
        f'the processes cannot find each other ({error}): give all of '
        '--coordinator_address, --num_processes and --process_id'
      ) from error


@contextlib.contextmanager
def joined(
  config: config_lib.RuntimeConfig,
  directory: str | os.PathLike,
  *,
  one_line: tuple[type[Exception], ...] = (),
) -> Iterator[Group]:
  """Joins the other processes of a run until the context ends.

  SLURM, Kubernetes, Cloud TPU and Open MPI are recognised; what `config` gives
  comes first. Where nothing is found this is the only process, and nothing is
  joined: its signals need no coordinator (`shutdown`). To be entered before
  JAX is asked for devices.

  Of several processes, one with an error does not leave the context: it says
  the error and ends without waiting for the others.

  Args:
    config: who the processes are, where that is not found out.
    directory: of the run; native code's own lines go to a file in it.
    one_line: errors that are said without a traceback.
  """
  if config.num_processes == 1:
    yield Group()
    return
  with contextlib.ExitStack() as stack:
    native = stack.enter_context(native_log.redirected(pathlib.Path(directory)))
    _initialize(config)
    if jax.process_count() == 1:
      stack.close()
      yield Group()
      return
    group = Group(
      index=jax.process_index(),
      count=jax.process_count(),
      timeout=config.peer_timeout_seconds,
    )
    native.name(group.index)
    try:
      yield group
      group.gather('end')
    finally:
      if (error := sys.exception()) is not None:
        _end(group, error, one_line)
    jax.distributed.shutdown()


def _end(group: Group, error: BaseException, one_line) -> None:
  """Says why, tells the others, and ends this process at once.

  An ordinary exit would wait for all others at JAX's shutdown barrier.
  """
  text = ' '.join(str(error).split()) or type(error).__name__
  if isinstance(error, PeerLostError) or _LOST_PEER.search(text):
    restart.end(f'process {group.index}: lost a peer: {text[:300]}')
  if not isinstance(error, (*one_line, PeerFailedError)):
    traceback.print_exception(error)
  sys.stderr.write(f'error: process {group.index}: {text}\n')
  sys.stderr.flush()
  set_once(_FAILED, f'process {group.index} failed: {text}')
  if group.is_primary:  # Its end takes the store away.
    time.sleep(_FAREWELL)
  os._exit(1)
