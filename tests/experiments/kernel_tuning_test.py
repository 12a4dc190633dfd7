import json

import pytest

from experiments import kernel_tuning
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


def test_there_is_nothing_to_tune_without_a_hopper_gpu():
  with pytest.raises(NotImplementedError, match='needs a Hopper GPU'):
    list(kernel_tuning.tune(repeats=1))


def test_the_table_is_written_when_all_is_measured(tmp_path, monkeypatch):
  table = tmp_path / 'table.json'
  table.write_text(mosaic_gpu_config.TABLE.read_text())
  monkeypatch.setattr(mosaic_gpu_config, 'TABLE', table)
  monkeypatch.setattr(mosaic_gpu, 'unavailable', lambda: None)
  monkeypatch.setattr(
    kernel_tuning, '_seconds', lambda case, config, *_: config.stages
  )
  monkeypatch.setattr(kernel_tuning, '_arguments', lambda case: {})
  found = list(kernel_tuning.tune(repeats=1))
  assert len(found) == 4 * len(kernel_tuning.SIZES) * len(CANDIDATES)
  new = [r for r in json.loads(table.read_text()) if r['device'] == 'cpu']
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
