import dataclasses
import math
import shutil

import pytest

from experiments.data import tokenizers
from experiments.evaluation import length_extrapolation
from experiments.training import stored_run
from tests.experiments import tiny_run

pytestmark = pytest.mark.usefixtures('standard_promotion', 'cached_compilation')


@pytest.fixture
def run(finished_run):
  return stored_run.load(finished_run.root)


def measure(*workdirs):
  found = length_extrapolation.rows(workdirs, times=8, max_scored=2)
  return list(found)


def test_a_finished_run_has_a_row_per_bucket(finished_run):
  (rows,) = measure(finished_run.root)
  bounds = [(row['first'], row['last']) for row in rows]
  assert bounds == [(16 * i + 1, 16 * i + 16) for i in range(16)]
  assert len({row['tokens'] for row in rows}) == 1
  for row in rows:
    assert row['bits_per_byte'] == row['loss'] / math.log(2)
    # Chance is log(257); sixty steps do better, and nothing is known for sure.
    assert 1 < row['loss'] < math.log(257)
    assert row['standard_error'] > 0
  about = {
    'kind': 'length',
    'run': 'run',
    'mixers': ['delta_net'],
    'training_length': 32,
    'steps': 60,
    'split': 'validation',
  }
  assert about.items() <= rows[0].items()
  assert length_extrapolation.format_row(rows[4]).startswith('run ')


def test_tokens_that_are_no_bytes_have_no_bits_per_byte(run, monkeypatch):
  changed = dataclasses.replace(run, tokenizer=object())
  monkeypatch.setattr(stored_run, 'load', lambda root: changed)
  (rows,) = measure('any')
  assert {row['bits_per_byte'] for row in rows} == {None}
  assert isinstance(run.tokenizer, tokenizers.ByteTokenizer)


def test_runs_that_cannot_be_compared_are_refused(run, monkeypatch, tmp_path):
  with pytest.raises(ValueError, match='each with a last part of its own'):
    measure()
  with pytest.raises(ValueError, match='each with a last part of its own'):
    measure(run.workdir.root, run.workdir.root)
  other = tmp_path / 'other'
  for change in (
    {'corpus': 'another'},
    {'config': tiny_run.replace(run.config, 'data', sequence_length=64)},
  ):
    workdir = dataclasses.replace(run.workdir, root=other)
    changed = dataclasses.replace(run, workdir=workdir, **change)
    found = {run.workdir.root: run, other: changed}
    with monkeypatch.context() as patch:
      patch.setattr(stored_run, 'load', found.__getitem__)
      with pytest.raises(ValueError, match='must have one corpus and one data'):
        measure(*found)


def test_a_run_that_is_not_finished_is_refused(finished_run, tmp_path):
  copy = shutil.copytree(finished_run.root, tmp_path / 'run')
  shutil.rmtree(copy / 'checkpoints' / '60')
  with pytest.raises(ValueError, match='is at step 50 of 60: finish it'):
    measure(copy)
