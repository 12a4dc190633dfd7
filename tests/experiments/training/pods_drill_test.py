"""Kills, stops and moves runs of several processes on this machine.

With RECORD_DRILLS set, the counts are appended to results/pods_drill.jsonl.
"""

import json
import random
import signal
import subprocess

import numpy as np
import pytest

from experiments.training import checkpoints as checkpoints_lib
from experiments.training import loop
from experiments.training import metrics as metrics_lib
from experiments.training import placement as placement_lib
from tests.experiments import tiny_run

SHOW = '--training.log_every_steps=5'
# A compilation on a busy machine is not a hang.
FLAGS = (SHOW, '--watchdog_seconds=120', '--peer_timeout_seconds=120')


def finish_all(processes):
  return [tiny_run.finish(process) for process in processes]


def error_lines(result) -> list[str]:
  """Returns the lines of an error stream that are no progress and no log."""
  return [
    line
    for line in result.stderr.splitlines()
    if not line.startswith(('step ', 'SIGTERM: ', 'I', 'W')) and line
  ]


def read_meta(config, root):
  with checkpoints_lib.Checkpoints(
    root / 'checkpoints', config.checkpoint
  ) as checkpoints:
    return checkpoints.read_meta()


def calm(config):
  """Returns a config whose rounding errors stay small over its steps."""
  return tiny_run.replace(config, 'optimizer', peak_learning_rate=1e-3)


def train_alone(config, root, compilation_cache):
  command = [*tiny_run.command(config, root), '--mesh.data=1']
  result = tiny_run.finish(tiny_run.start(command, compilation_cache))
  assert result.returncode == 0, result.stderr


def test_killed_stopped_and_moved_to_one_process(
  tiny_config, tmp_path, compilation_cache
):
  config, root = calm(tiny_config), tmp_path / 'run'
  reference = tmp_path / 'reference'
  train_alone(config, reference, compilation_cache)
  draw = random.Random(0)

  def start():
    return tiny_run.start_processes(
      config, root, compilation_cache, count=2, flags=FLAGS
    )

  # One process of the two dies.
  processes = start()
  victim = draw.randrange(2)
  # The save at 20 waits for the one at 10.
  tiny_run.wait_for_step(processes[0], 25)
  processes[victim].kill()
  survivor = finish_all(processes)[1 - victim]
  assert survivor.returncode == 75
  (line,) = error_lines(survivor)
  assert line.startswith(f'error: process {1 - victim}: lost ')
  assert line.endswith('exit 75: the same command resumes')
  killed_at = max(tiny_run.saved_steps(root))
  assert killed_at >= 10

  # Both resume; one of them is asked to stop.
  processes = start()
  tiny_run.wait_for_step(processes[0], 35)
  processes[1].send_signal(signal.SIGTERM)
  for result in finish_all(processes):
    assert result.returncode == 0, result.stderr
    assert not error_lines(result)
  stopped_at = max(tiny_run.saved_steps(root))
  assert 35 < stopped_at < 60
  said = f'SIGTERM: step {stopped_at} is saved; the same command resumes'
  assert (root / 'log.txt').read_text().count(said) == 1
  assert read_meta(config, root)['data_position'] == stopped_at

  # One process with one device finishes.
  train_alone(config, root, compilation_cache)
  assert read_meta(config, root)['data_position'] == 60
  tiny_run.assert_near_rows(root, reference)
  check_goodput(root)


def check_goodput(root):
  """Over all starts time goes on, and a part of it was productive."""
  rows = metrics_lib.read_rows(root / 'metrics.jsonl')
  train = [row for row in rows if row['kind'] == 'train']
  walls = [row['wall_seconds'] for row in train]
  assert walls == sorted(walls)
  productive = sum(row['seconds'] for row in train)
  last = train[-1]
  assert 0 < last['goodput'] * last['wall_seconds'] < productive
  assert last['goodput'] < 1
  report = json.loads((root / 'report.json').read_text())
  assert report['goodput'] == round(last['goodput'], 4)


def _train_on(monkeypatch, config, root, *, stop_at=None, **mesh):
  """Trains on a mesh, up to a step; returns the token ids of its batches."""
  ids = []

  def note(placement, batch, num_rows):
    del placement, num_rows
    if 'scored' not in batch:  # Not of an evaluation.
      ids.append(batch['tokens'].copy())

  def interrupt(log, step, values):
    del log, values
    if step == stop_at:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    tiny_run.before(patch, placement_lib.Placement, 'put', note)
    tiny_run.before(patch, loop._StepLog, 'push', interrupt)
    said = loop.train(tiny_run.replace(config, 'mesh', **mesh), root)
  assert (said == 'interrupted') == (stop_at is not None)
  return ids


@pytest.mark.usefixtures('standard_promotion', 'cached_compilation')
@pytest.mark.filterwarnings('ignore:.*mesh takes')
def test_a_run_moves_from_8_to_4_to_2_devices_to_1(
  tiny_config, tmp_path, monkeypatch
):
  config = tiny_run.replace(tiny_config, 'data', batch_size=8)
  config = tiny_run.replace(config, 'training', num_steps=20)
  whole, moved = tmp_path / 'whole', tmp_path / 'moved'
  expected = _train_on(monkeypatch, config, whole, data=1)
  ids = []
  for mesh, stop_at in (
    ({'data': 8}, 5),
    ({'data': 1, 'fsdp': 2, 'sequence': 2}, 10),
    ({'data': 1, 'sequence': 2}, 15),
    ({'data': 1}, None),
  ):
    ids += _train_on(monkeypatch, config, moved, stop_at=stop_at, **mesh)
  assert len(ids) == len(expected) == 20
  for one, other in zip(ids, expected, strict=True):
    np.testing.assert_array_equal(one, other)
  tiny_run.assert_near_rows(moved, whole)


@pytest.mark.drill
@pytest.mark.parametrize('count', [2, 4])
def test_killed_again_and_again_it_ends_as_undisturbed(
  tiny_config, tmp_path, compilation_cache, count
):
  config = tiny_run.replace(calm(tiny_config), 'data', batch_size=4)
  draw = random.Random(count)
  counts = {'processes': count, 'kills': 0, 'stops': 0, 'starts': 0}
  reference, root = tmp_path / 'reference', tmp_path / 'run'
  train_alone(config, reference, compilation_cache)
  # Alternately all processes over data and over a sharded state.
  meshes = (f'--mesh.data={count}', f'--mesh.fsdp={count}')
  while not (root / 'report.json').exists():
    processes = tiny_run.start_processes(
      config,
      root,
      compilation_cache,
      count=count,
      flags=(*FLAGS, meshes[counts['starts'] % 2]),
    )
    counts['starts'] += 1
    chosen = draw.randrange(count)
    number = draw.choice((signal.SIGKILL, signal.SIGTERM))
    if counts['kills'] + counts['stops'] < 8:
      if number == signal.SIGTERM:  # Its handler is there by then.
        tiny_run.wait_for_step(processes[0])
      try:
        processes[chosen].wait(draw.uniform(0, 20))
      except subprocess.TimeoutExpired:
        processes[chosen].send_signal(number)
    results = finish_all(processes)
    codes = [result.returncode for result in results]
    if number == signal.SIGKILL and -signal.SIGKILL in codes:
      counts['kills'] += 1
      assert sorted(codes) == [-signal.SIGKILL] + [75] * (count - 1), results
    else:
      counts['stops'] += not (root / 'report.json').exists()
      assert codes == [0] * count, results
  tiny_run.assert_near_rows(root, reference)
  tiny_run.record('pods_drill', counts)
  assert counts['kills'] and counts['stops']
