import pytest

from experiments import scaling_figures

ROWS = [
  {
    'implementation': implementation,
    'axis': axis,
    'num_devices': count,
    'flops': 80 / count,
    'memory_traffic_bytes': (80 + 4 * (count == 2)) / count,
    'sent_bytes': 1e9 * count,
  }
  | ({'formula_bytes': 1e9 * count} if implementation == 'xla' else {})
  for implementation in ('xla', 'mosaic_gpu')
  for axis, count in (
    ('fsdp', 1),
    ('fsdp', 8),
    ('sequence', 2),
    ('sequence', 1),
  )
]


def test_ratios_are_to_the_one_device_of_the_axis():
  ratios = scaling_figures.ratios
  assert ratios(ROWS, 'xla', 'fsdp', 'flops') == {1: 1, 8: 1}
  found = ratios(ROWS, 'mosaic_gpu', 'sequence', 'memory_traffic_bytes')
  assert found == {1: 1, 2: 1.05}


def test_a_figure_needs_the_row_of_one_device(tmp_path):
  with pytest.raises(ValueError, match='a single device .* none for xla, fsdp'):
    scaling_figures.draw_scaling(ROWS[1:], tmp_path / 'x.png')


def test_draws_a_picture(tmp_path):
  path = tmp_path / 'scaling.png'
  scaling_figures.draw_scaling(ROWS, path)
  assert path.read_bytes().startswith(b'\x89PNG')
