"""What native code writes about lost peers: into a file, and one line of it.

When a process of a run dies, JAX's coordination service aborts the others with
tens of lines of C++ stack on the standard error stream. Here these lines go to
a file, and the abort becomes one line and `restart.EXIT_CODE`.
"""

from collections.abc import Iterator
import contextlib
import ctypes
import os
import pathlib
import re
import signal
import sys
import tempfile

from absl import logging

from experiments.training import restart

_TAIL = 1 << 16  # Bytes at the end of the file that are looked at.
_FATAL = 'JAX distributed service detected fatal errors'
_SILENT = re.compile(r'stopped sending heartbeats\):\n((?:\d+\n)+)')
_STDERR = 2

_HandlerType = ctypes.CFUNCTYPE(None, ctypes.c_int)


class NativeLog:
  """The file that file descriptor 2 points to; Python's stderr does not."""

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    self._path: pathlib.Path | None = None
    self._process = ''
    self._python_stderr = sys.stderr
    self._original = os.dup(_STDERR)
    # Without a name until it is known which process of the run this is.
    self._file = tempfile.TemporaryFile()  # noqa: SIM115
    os.dup2(self._file.fileno(), _STDERR)
    self._set_stderr(os.fdopen(os.dup(self._original), 'w', buffering=1))
    self._handler = _HandlerType(self._on_abort)
    self._previous = _set_handler(self._handler)

  def name(self, index: int) -> None:
    """Gives the file its name in the directory of the run.

    Args:
      index: of this process.
    """
    self._process = f'process {index}: '
    self._path = self._directory / f'native_{index}.log'
    self._directory.mkdir(parents=True, exist_ok=True)
    written = self._read_tail()
    with self._path.open('ab') as file:
      file.write(written)
      file.flush()
      os.dup2(file.fileno(), _STDERR)

  def close(self) -> None:
    """Points file descriptor 2 to where it pointed, with what has no file."""
    _set_handler(self._previous)
    if self._path is None:
      os.write(self._original, self._read_tail())
    os.dup2(self._original, _STDERR)
    os.close(self._original)
    sys.stderr.close()
    self._set_stderr(self._python_stderr)
    self._file.close()

  def _set_stderr(self, stream) -> None:
    sys.stderr = stream
    logging.get_absl_handler().python_handler.stream = stream

  def _read_tail(self) -> bytes:
    size = os.fstat(self._file.fileno()).st_size
    return os.pread(self._file.fileno(), _TAIL, max(0, size - _TAIL))

  def _on_abort(self, number: int) -> None:
    """Handles SIGABRT in the thread that aborts; other aborts go on."""
    del number
    if self._path is not None:
      text = self._path.read_bytes()[-_TAIL:].decode(errors='replace')
    else:
      text = self._read_tail().decode(errors='replace')
    if _FATAL in text:
      restart.end(f'{self._process}{_explain(text)}{self._where()}')
    sys.stderr.write(
      f'error: {self._process}native code aborted{self._where()}\n'
    )

  def _where(self) -> str:
    return f' (more in {self._path})' if self._path else ''


def _explain(text: str) -> str:
  """Returns who is gone, by the last words of the coordination service."""
  if silent := _SILENT.findall(text):
    return f'lost process {", ".join(silent[-1].split())}, which is silent'
  if 'RegisterTask' in text.rpartition(_FATAL)[2]:
    return 'the other processes did not start in time'
  return 'lost process 0, which is gone or cannot be reached'


def _set_handler(handler):
  """Sets the C handler of SIGABRT and returns the one before.

  Python's own handlers run later, in the main thread; after an abort there is
  no later.
  """
  function = ctypes.CDLL(None).signal
  function.restype = ctypes.c_void_p
  function.argtypes = [ctypes.c_int, ctypes.c_void_p]
  return function(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


@contextlib.contextmanager
def redirected(directory: pathlib.Path) -> Iterator[NativeLog]:
  """Sends what native code writes to a file until the context ends."""
  log = NativeLog(directory)
  try:
    yield log
  finally:
    log.close()
