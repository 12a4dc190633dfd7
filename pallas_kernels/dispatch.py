"""Chooses which implementation of an op runs, and says why."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import logging
from typing import Any

_logger = logging.getLogger('pallas_kernels')

# `None`: automatic; a name: that one or an error; names: tried in this order.
Choice = str | Sequence[str] | None


def _always_available() -> str | None:
  return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
  """One way to compute an op.

  Attributes:
    name: what users write in `implementation=`.
    function: computes the op; raises NotImplementedError, with the reason, for
      arguments that it does not cover.
    unavailable: the reason why this machine cannot run it, or None.
    exchanges: whether it takes `exchange`, a `sequence_parallel.Exchange` or
      None, and shares a row with other devices by itself.
  """

  name: str
  function: Callable[..., Any]
  unavailable: Callable[[], str | None] = _always_available
  exchanges: bool = False


@functools.cache
def _log_once(message: str) -> None:
  _logger.info(message)


@dataclasses.dataclass(frozen=True)
class Op:
  """An op and its implementations, the automatic choice first."""

  name: str
  implementations: tuple[Implementation, ...]

  def explain(self) -> list[tuple[str, str | None]]:
    """Returns (implementation, reason it cannot run here or None), in order."""
    return [(i.name, i.unavailable()) for i in self.implementations]

  def candidates(self, choice: Choice) -> list[Implementation]:
    """Returns the implementations to try, in order.

    Raises:
      ValueError: `choice` names an implementation that the op does not have,
        or none at all.
    """
    if choice is None:
      return list(self.implementations)
    names = [choice] if isinstance(choice, str) else list(choice)
    known = {i.name: i for i in self.implementations}
    for name in names:
      if name not in known:
        raise ValueError(
          f'implementation of {self.name} must be one of '
          f'{", ".join(known)}, got {name!r}'
        )
    if not names:
      raise ValueError(f'implementation of {self.name} is an empty sequence')
    return [known[name] for name in names]

  def first(
    self, choice: Choice, attempt: Callable[[Implementation], Any]
  ) -> Any:
    """Returns what `attempt` makes of the first candidate that it can use.

    Args:
      choice: the candidates.
      attempt: raises NotImplementedError, with the reason, for those that do
        not cover its arguments.

    Raises:
      NotImplementedError: every candidate declined; names each reason.
      ValueError: see `candidates`.
    """
    refusals = []
    for implementation in self.candidates(choice):
      reason = implementation.unavailable()
      if reason is None:
        try:
          result = attempt(implementation)
        except NotImplementedError as error:
          reason = str(error)
        else:
          why = '; '.join(refusals) or f'implementation={choice!r}'
          _log_once(f'{self.name} runs as {implementation.name} ({why})')
          return result
      refusals.append(f'not {implementation.name}: {reason}')
    raise NotImplementedError(f'{self.name}: {"; ".join(refusals)}')

  def __call__(self, choice: Choice, *args, **kwargs):
    """Runs the first implementation that covers the arguments; see `first`."""
    return self.first(choice, lambda i: i.function(*args, **kwargs))
