"""Damages the checkpoints of a training run, and fills its disk.

With RECORD_DRILLS set, the counts are appended to results/damage_drill.jsonl.
"""

import random
import resource
import shutil

import jax
import numpy as np
import pytest

from experiments.training import checkpoints as checkpoints_lib
from experiments.training import loop
from experiments.training import train_step
from tests.experiments import tiny_run

pytestmark = pytest.mark.usefixtures('standard_promotion', 'cached_compilation')


def _restore(config, root):
  state = jax.eval_shape(lambda: train_step.init_state(config))
  with checkpoints_lib.Checkpoints(
    root / 'checkpoints', config.checkpoint
  ) as checkpoints:
    restored = checkpoints.restore(state)
  leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored[1])]
  return restored.step, leaves


def _flip_a_bit(path, draw):
  data = bytearray(path.read_bytes())
  data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
  path.write_bytes(data)


def test_a_flipped_bit_never_gives_other_weights(finished_run, tmp_path):
  draw = random.Random(0)
  root = shutil.copytree(finished_run.root, tmp_path / 'run')
  newest = root / 'checkpoints' / '60'
  untouched = _restore(finished_run.config, root)
  shutil.copytree(newest, tmp_path / 'kept')
  shutil.rmtree(newest)
  fallback = _restore(finished_run.config, root)
  assert (untouched[0], fallback[0]) == (60, 50)
  counts = {'files': 0, 'fell_back': 0, 'harmless': 0}
  for kept in sorted((tmp_path / 'kept').rglob('*')):
    if not kept.is_file() or not kept.stat().st_size:
      continue
    shutil.copytree(tmp_path / 'kept', newest)
    _flip_a_bit(newest / kept.relative_to(tmp_path / 'kept'), draw)
    restored = _restore(finished_run.config, root)
    counts['files'] += 1
    counts['fell_back'] += restored == fallback
    counts['harmless'] += restored == untouched
    shutil.rmtree(newest)
  tiny_run.record('damage_drill', counts)
  assert counts['files'] > 5
  assert counts['fell_back'] + counts['harmless'] == counts['files']


def test_a_run_with_a_damaged_checkpoint_ends_as_without(
  finished_run, tmp_path
):
  root = shutil.copytree(finished_run.root, tmp_path / 'run')
  (root / 'report.json').unlink()
  files = [p for p in (root / 'checkpoints' / '60').rglob('*') if p.is_file()]
  _flip_a_bit(max(files, key=lambda p: p.stat().st_size), random.Random(0))
  loop.train(finished_run.config, root)
  tiny_run.assert_same_rows(root, finished_run)
  names = {path.name for path in (root / 'checkpoints').iterdir()}
  assert names == {'40', '50', '60', '60.damaged'}


# Orbax's threads still report to their event loop after a failed save ended it.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_full_disk_costs_checkpoints_but_no_step(
  finished_run, tmp_path, monkeypatch
):
  save = checkpoints_lib.Checkpoints.save
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

  def save_on_a_full_disk(checkpoints, step, state, meta):
    if step == 40:
      raise tiny_run.Killed
    if step not in (20, 30):
      save(checkpoints, step, state, meta)
      checkpoints.wait()  # Before the disk is full.
      return
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
      save(checkpoints, step, state, meta)
      with pytest.raises(checkpoints_lib.SaveFailedError):
        checkpoints.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints_lib.Checkpoints, 'save', save_on_a_full_disk)
    with pytest.raises(tiny_run.Killed):
      loop.train(finished_run.config, tmp_path)
  assert tiny_run.saved_steps(tmp_path) == [10]
  assert _restore(finished_run.config, tmp_path)[0] == 10
  loop.train(finished_run.config, tmp_path)
  tiny_run.assert_same_rows(tmp_path, finished_run)
