"""What every generator of a synthetic task returns."""

from typing import NamedTuple

import numpy as np

IGNORED = -1


class Examples(NamedTuple):
  """Examples of a task.

  Attributes:
    inputs: int32 [N, T], tokens.
    targets: int32 [N, T], the token to predict at that position; `IGNORED`
      where nothing is scored.
    allowed: bool [N, T, vocab], the predictions that count as right; None: the
      target alone.
  """

  inputs: np.ndarray
  targets: np.ndarray
  allowed: np.ndarray | None = None


def require(condition: bool, rule: str, **values: object) -> None:
  """Raises ValueError with the rule and the values unless it is kept."""
  if not condition:
    got = ' and '.join(f'{name}={value!r}' for name, value in values.items())
    raise ValueError(f'{rule}, got {got}')
