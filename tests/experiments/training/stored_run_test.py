import dataclasses
import json
import shutil

import jax
import pytest

from experiments.training import checkpoints
from experiments.training import stored_run
from tests.experiments import tiny_run


@pytest.fixture
def run_copy(finished_run, tmp_path):
  return shutil.copytree(finished_run.root, tmp_path / 'run')


def test_loading_changes_nothing(run_copy, finished_run):
  old = tiny_run.contents(run_copy)
  run = stored_run.load(run_copy)
  assert run.config == finished_run.config
  assert run.tokenizer.name == 'byte'
  assert run.step == 60 and run.is_finished
  assert tiny_run.contents(run_copy) == old


def test_a_damaged_checkpoint_is_passed_over(run_copy):
  newest = run_copy / 'checkpoints' / '60'
  (newest / 'CHECKSUMS.json').write_text('{}')
  fallback = stored_run.load(run_copy)
  assert fallback.step == 50 and not fallback.is_finished
  shutil.rmtree(newest)
  expected = stored_run.load(run_copy)
  for found, wanted in zip(
    jax.tree.leaves(fallback.params),
    jax.tree.leaves(expected.params),
    strict=True,
  ):
    assert found.tobytes() == wanted.tobytes()


def test_what_is_missing_or_damaged_is_named(run_copy, tmp_path):
  def refused(match, error=ValueError, root=run_copy):
    with pytest.raises(error, match=match):
      stored_run.load(root)

  refused('config.json is missing', root=tmp_path / 'none')
  for seal in run_copy.glob('checkpoints/*/CHECKSUMS.json'):
    seal.unlink()
  refused('no checkpoint in', checkpoints.CheckpointsDamagedError)
  shutil.rmtree(run_copy / 'checkpoints')
  refused('no checkpoint yet')
  config = run_copy / 'config.json'
  identity = json.loads(config.read_text())
  config.write_text(json.dumps(identity | {'tokenizer': 'another'}))
  refused('has changed since the training')
  identity['config']['model']['num_layers'] = 'two'
  config.write_text(json.dumps(identity))
  refused('config.model.num_layers must be')
  config.write_text('[]')
  refused('does not describe a run')
  config.write_text('{')
  refused('is not JSON')


def test_the_store_is_the_one_of_the_training(finished_run):
  run = stored_run.load(finished_run.root)
  assert run.open_store().fingerprint == run.corpus
  changed = dataclasses.replace(run, corpus='another')
  with pytest.raises(ValueError, match='tokens has changed since the training'):
    changed.open_store()
