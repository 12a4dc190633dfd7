"""A request to end that all processes of a run obey at the same step.

The signal may reach one process only, and at any moment. That process says at
the start of a step s, before it hands s to the device, that all end at s + 2.
No other has begun s + 2 by then: a process begins a step when the one two
before it is complete (the metrics of a step are read one step late), which
takes every process. Whoever begins s + 2 therefore looks after it was said.
"""

import time

from experiments.training import processes
from experiments.training import shutdown

_KEY = 'stop'
_LOOK_SECONDS = 1.0


class AgreedStop:
  """What `shutdown.ShutdownRequest` is to one process, to all of a run."""

  def __init__(self, request: shutdown.ShutdownRequest, group: processes.Group):
    self._request = request
    self._group = group
    self._said = False
    self._heard: tuple[int, str] | None = None  # The step, and the signal.
    self._looked = 0.0

  @property
  def name(self) -> str:
    """The signal's name, empty if none came."""
    return self._heard[1] if self._heard else self._request.name

  def __bool__(self) -> bool:
    """Whether a signal came to any process; before the first step only."""
    if self._group.count == 1:
      return bool(self._request)
    self.say(0)
    if time.monotonic() - self._looked > _LOOK_SECONDS:
      self._looked = time.monotonic()
      self._group.show_life()
      self._hear()
    return self._heard is not None or bool(self._request)

  def say(self, step: int) -> None:
    """Tells the others to end at a step, if a signal came to this process."""
    if self._request and not self._said and self._group.count > 1:
      self._said = True
      processes.set_once(_KEY, f'{step} {self._request.name}')

  def begin(self) -> None:
    """Waits for all processes, between preparing and the first step."""
    self.say(0)
    self._group.gather('first step')

  def at(self, step: int) -> bool:
    """Whether all processes end at this step; asked once, at its start."""
    if self._group.count == 1:
      return bool(self._request)
    self.say(step + 2)
    self._hear()
    return self._heard is not None and step >= self._heard[0]

  def _hear(self) -> None:
    if self._heard is None and (text := processes.try_get(_KEY)) is not None:
      step, _, name = text.partition(' ')
      self._heard = (int(step), name)
