"""Turns SIGTERM and Ctrl-C into a request that long loops read."""

from collections.abc import Iterator
import contextlib
import signal

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class ShutdownError(Exception):
  """Work ended early because the process was asked to end."""


class ShutdownRequest:
  """Whether the process was asked to end, and by which signal."""

  def __init__(self):
    self._signal: signal.Signals | None = None

  def receive(self, number: int, frame: object) -> None:
    """Remembers the signal (a signal handler)."""
    del frame
    self._signal = signal.Signals(number)

  @property
  def name(self) -> str:
    """The signal's name, empty if none came."""
    return self._signal.name if self._signal else ''

  def __bool__(self) -> bool:
    return self._signal is not None


@contextlib.contextmanager
def requested() -> Iterator[ShutdownRequest]:
  """Catches SIGTERM and SIGINT until the context ends; main thread only."""
  request = ShutdownRequest()
  previous = {s: signal.signal(s, request.receive) for s in _SIGNALS}
  try:
    yield request
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
