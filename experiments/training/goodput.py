"""The share of a run's time that trained it, whatever stopped it between."""

import json
import pathlib
import time

from experiments import atomic_file


class Goodput:
  """Productive seconds over all seconds since the run was first started.

  Productive are the steps that count: not those that a restart does again, not
  the first of each start (it compiles), no evaluation, no waiting for a queue.
  """

  def __init__(self, first_start: float, productive: float = 0.0):
    """Goes on counting.

    Args:
      first_start: time of the run's first start, in seconds since 1970.
      productive: seconds of the steps up to the one that this start resumes.
    """
    self._first_start = first_start
    self._productive = productive
    self._is_first = True

  def add(self, seconds: float) -> dict[str, float]:
    """Counts a step; returns the `goodput` and `wall_seconds` of its row."""
    if not self._is_first:
      self._productive += seconds
    self._is_first = False
    wall = max(time.time() - self._first_start, self._productive)
    return {
      'goodput': self._productive / wall if wall else 0.0,
      'wall_seconds': wall,
    }


def first_start(path: pathlib.Path) -> float:
  """Returns when the run was first started; writes it if that is now.

  Args:
    path: of the file that keeps it.

  Raises:
    ValueError: the file does not hold what this function writes.
  """
  if path.exists():
    try:
      return float(json.loads(path.read_text())['first_start'])
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f'{path} does not hold the time of the first start ({error}); delete '
        'it, and the goodput counts from now'
      ) from error
  now = time.time()
  atomic_file.replace(path, json.dumps({'first_start': now}) + '\n')
  return now


def productive_seconds(rows: list[dict]) -> float:
  """Returns the productive seconds up to the last of a run's rows."""
  for row in reversed(rows):
    if row['kind'] == 'train':
      return row.get('goodput', 0.0) * row.get('wall_seconds', 0.0)
  return 0.0
