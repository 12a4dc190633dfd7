import functools
import json

import jax.numpy as jnp
import pytest

from experiments import kernel_tuning
from experiments import result_rows
from pallas_kernels.delta_rule import mosaic_gpu
from pallas_kernels.delta_rule import mosaic_gpu_config

CANDIDATES = tuple(mosaic_gpu_config.candidates())


def _rows(times):
  """Returns rows of one K and V from {size: a time per candidate}."""
  return [
    {
      'shape': {'name': name, 'K': 64, 'V': 128},
      'stages': config.stages,
      'inverse_groups': config.inverse_groups,
      'seconds': seconds,
    }
    for name, all_seconds in times.items()
    for config, seconds in zip(CANDIDATES, all_seconds, strict=True)
  ]


def test_the_best_candidate_is_best_relative_to_the_fastest():
  # In seconds the last one wins, by the large size alone.
  times = {'few': [1, 1, 9, 9, 9, 3], 'many': [120, 110, 900, 900, 900, 100]}
  (row,) = kernel_tuning.best(_rows(times), 'NVIDIA H999')
  best = CANDIDATES[1]
  assert row == {
    'device': 'NVIDIA H999',
    'K': 64,
    'V': 128,
    'dtype': 'bfloat16',
    'stages': best.stages,
    'inverse_groups': best.inverse_groups,
  }


def test_a_candidate_that_does_not_fit_somewhere_is_not_chosen():
  times = {'few': [None, 2, 3, 3, 3, 3], 'many': [1, 2, 3, 3, 3, 3]}
  (row,) = kernel_tuning.best(_rows(times), 'x')
  assert row['inverse_groups'] == CANDIDATES[1].inverse_groups


def test_candidates_that_fit_only_some_sizes_are_an_error():
  times = {'few': [1] + [None] * 5, 'many': [None] + [1] * 5}
  with pytest.raises(ValueError, match='must run at all sizes'):
    kernel_tuning.best(_rows(times), 'x')


def test_no_candidate_that_fits_is_an_error():
  none = [None] * len(CANDIDATES)
  times = {'few': none, 'many': none}
  with pytest.raises(ValueError, match=r'none did at K, V = \(64, 128\)'):
    kernel_tuning.best(_rows(times), 'x')


def test_there_is_nothing_to_tune_without_a_hopper_gpu(tmp_path):
  with pytest.raises(NotImplementedError, match='needs a Hopper GPU'):
    list(kernel_tuning.tune(tmp_path / 'rows.jsonl', repeats=1))


@pytest.fixture
def measured(tmp_path, monkeypatch):
  """What was measured, on a device that takes a second per stage."""
  table = tmp_path / 'table.json'
  table.write_text(mosaic_gpu_config.TABLE.read_text())
  monkeypatch.setattr(mosaic_gpu_config, 'TABLE', table)
  monkeypatch.setattr(mosaic_gpu, 'unavailable', lambda: None)
  calls = []

  def seconds(case, configs, *_):
    calls.extend((case.name, config) for config in configs)
    return [config.stages for config in configs]

  monkeypatch.setattr(kernel_tuning, '_seconds', seconds)
  monkeypatch.setattr(kernel_tuning, '_arguments', lambda case: {})
  return calls


def test_candidates_that_do_not_fit_have_no_time(monkeypatch):
  def program(case, config, arguments):
    assert (case, arguments) == ('case', 'arguments')
    return None if config.stages == 3 else functools.partial(jnp.ones, 8)

  monkeypatch.setattr(kernel_tuning, '_program', program)
  seconds = kernel_tuning._seconds('case', CANDIDATES, 'arguments', 2)
  assert [s is None for s in seconds] == [c.stages == 3 for c in CANDIDATES]
  assert all(s > 0 for s in seconds if s is not None)


def test_the_table_is_written_when_all_is_measured(tmp_path, measured):
  path = tmp_path / 'new' / 'rows.jsonl'
  found = list(kernel_tuning.tune(path, repeats=1))
  assert len(found) == 4 * len(kernel_tuning.SIZES) * len(CANDIDATES)
  assert len(measured) == len(found)
  assert result_rows.read(path) == found
  table = json.loads(mosaic_gpu_config.TABLE.read_text())
  new = [r for r in table if r['device'] == 'cpu']
  assert [(r['K'], r['V']) for r in new] == [
    (64, 64),
    (64, 128),
    (128, 64),
    (128, 128),
  ]
  assert {r['stages'] for r in new} == {2}
  assert kernel_tuning.format_row(found[0]) == (
    'b2_t8192_h16_d64_64: stages 2, inverse_groups 1: 2000.000 ms'
  )


def test_what_was_measured_on_this_kind_of_device_is_not_again(
  tmp_path, measured
):
  path = tmp_path / 'rows.jsonl'
  whole = list(kernel_tuning.tune(path, repeats=1))
  elsewhere = whole[3] | {'device': '1 x other', 'seconds': 0.5}
  rows = [elsewhere, *whole[:3], *whole[4:]]
  result_rows.write(path, rows)
  measured.clear()
  again = list(kernel_tuning.tune(path, repeats=1))
  assert len(measured) == 1
  assert [r['seconds'] for r in again] == [r['seconds'] for r in whole]
  assert result_rows.read(path)[:-1] == rows


def test_what_another_commit_measured_is_measured_anew(tmp_path, measured):
  path = tmp_path / 'rows.jsonl'
  whole = list(kernel_tuning.tune(path, repeats=1))
  elsewhere = whole[0] | {'device': '1 x other', 'commit': 'old'}
  old = [row | {'commit': 'old'} for row in whole]
  result_rows.write(path, [elsewhere, *old])
  measured.clear()
  again = list(kernel_tuning.tune(path, repeats=1))
  assert len(measured) == len(again) == len(whole)
  assert result_rows.read(path) == [elsewhere, *again]
