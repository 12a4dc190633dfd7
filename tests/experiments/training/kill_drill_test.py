"""Kills a training run at random moments and compares what it leaves.

With RECORD_DRILLS set, the counts are appended to results/kill_drill.jsonl.
"""

import collections
import pathlib
import random
import subprocess
import time

import pytest

from tests.experiments import tiny_run


def _is_killed(process: subprocess.Popen, delay: float) -> bool:
  """Kills a process after a delay; False if it ended before."""
  try:
    process.communicate(timeout=delay)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    return True
  assert process.returncode == 0
  return False


def _different_rows(root: pathlib.Path, finished_root: pathlib.Path) -> int:
  """Counts rows that are missing, doubled, or differ in any bit."""
  found, expected = (
    collections.Counter(repr(row) for row in tiny_run.rows_of(directory))
    for directory in (root, finished_root)
  )
  return ((found - expected) + (expected - found)).total()


def _drill(finished_run, directory, cache, *, kills: int, seed: int):
  """Kills runs until there were that many kills; finishes the last one."""
  draw = random.Random(seed)
  counts = {'kills': 0, 'starts': 0, 'runs': 0, 'different_rows': 0}
  root, duration = directory / '0', None
  while True:
    command = tiny_run.command(finished_run.config, root)
    process = tiny_run.start(command, cache)
    counts['starts'] += 1
    began = time.monotonic()
    if counts['kills'] < kills and duration is not None:
      # From the imports to past the end.
      if _is_killed(process, draw.uniform(0.2, 1.1) * duration):
        counts['kills'] += 1
        continue
    else:
      result = tiny_run.finish(process)
      assert result.returncode == 0, result.stderr
    duration = duration or time.monotonic() - began
    counts['runs'] += 1
    counts['different_rows'] += _different_rows(root, finished_run.root)
    tiny_run.assert_same_rows(root, finished_run)
    if counts['kills'] == kills:
      return counts
    root = directory / str(counts['runs'])


@pytest.mark.parametrize(
  'kills', [20, pytest.param(50, marks=pytest.mark.drill)]
)
def test_a_killed_run_writes_what_the_undisturbed_one_writes(
  finished_run, tmp_path, compilation_cache, kills
):
  counts = _drill(
    finished_run, tmp_path, compilation_cache, kills=kills, seed=kills
  )
  tiny_run.record('kill_drill', counts)
  assert counts['kills'] == kills
  assert counts['different_rows'] == 0
