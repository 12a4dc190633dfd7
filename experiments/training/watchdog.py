"""Ends a process whose steps hang: a dead peer, a stuck device, a full disk."""

import faulthandler
import os
import pathlib
import threading
import time
from typing import Self

from experiments.training import restart

# A first step compiles.
_FIRST = 3.0
# Native code that never lets Python run is ended by the C watchdog, later.
_GRACE = 1.1
_GRACE_SECONDS = 10.0
_STDERR = 2


class Watchdog:
  """Expects a sign of life every so often while it is a context.

  When none comes, the stacks of all threads go to a file, one line to the
  error stream, and the process ends with `restart.EXIT_CODE`. (With 1, and the
  stacks in the error stream, where native code holds Python's lock for good.)
  """

  def __init__(self, seconds: float, path: pathlib.Path):
    """Does nothing yet.

    Args:
      seconds: between signs of life, and three times that after each of the
        first two, which compile and run the first step; 0: for ever.
      path: of the file of the stacks.
    """
    self._seconds = seconds
    self._path = path
    self._beats = 0
    self._limit = 0.0
    self._deadline: float | None = None
    self._is_open = True
    self._changed = threading.Condition()

  def beat(self) -> None:
    """Gives a sign of life."""
    if not self._seconds or not self._is_open:
      return
    limit = self._seconds * (_FIRST if self._beats < 2 else 1)
    self._beats += 1
    faulthandler.dump_traceback_later(
      limit * _GRACE + _GRACE_SECONDS, exit=True, file=_STDERR
    )
    with self._changed:
      self._limit = limit
      self._deadline = time.monotonic() + limit
      self._changed.notify()

  def pause(self) -> None:
    """Expects no sign of life until after the next one."""
    faulthandler.cancel_dump_traceback_later()
    with self._changed:
      self._deadline = None
      self._changed.notify()

  def __enter__(self) -> Self:
    if self._seconds:
      watching = threading.Thread(target=self._watch, daemon=True)
      watching.start()
    return self

  def __exit__(self, *unused_exception) -> None:
    self.pause()
    with self._changed:
      self._is_open = False
      self._changed.notify()

  def _watch(self) -> None:
    with self._changed:
      while self._is_open:
        left = None
        if self._deadline is not None:
          left = self._deadline - time.monotonic()
          if left <= 0:
            self._end()
        self._changed.wait(left)

  def _end(self) -> None:
    try:
      with self._path.open('a') as file:
        file.write(f'{time.ctime()}, process {os.getpid()}\n')
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
      where = str(self._path)
    except OSError:  # The disk may be what hangs or is full.
      faulthandler.dump_traceback(_STDERR, all_threads=True)
      where = 'the error stream'
    restart.end(
      f'no step was done for {self._limit:g} s (--watchdog_seconds), the '
      f'stacks of all threads are in {where}'
    )
