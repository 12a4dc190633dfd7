import pytest

from experiments import scaling_figures

ROWS = [
  {
    'axis': axis,
    'num_devices': count,
    'flops': 80 / count,
    'memory_traffic_bytes': (80 + 4 * (axis == 'sequence')) / count,
    'sent_bytes': 1e9 * count,
    'formula_bytes': 1e9 * count,
  }
  for axis, count in (('fsdp', 1), ('fsdp', 8), ('sequence', 2))
]


def test_ratios_are_to_the_one_device_of_all_axes():
  ratios = scaling_figures.ratios
  assert ratios(ROWS, 'fsdp', 'flops') == {1: 1, 8: 1}
  assert ratios(ROWS, 'sequence', 'memory_traffic_bytes') == {1: 1, 2: 1.05}


def test_a_figure_needs_the_row_of_one_device(tmp_path):
  with pytest.raises(ValueError, match='one of a single device'):
    scaling_figures.draw_scaling(ROWS[1:], tmp_path / 'x.png')


def test_draws_a_picture(tmp_path):
  path = tmp_path / 'scaling.png'
  scaling_figures.draw_scaling(ROWS, path)
  assert path.read_bytes().startswith(b'\x89PNG')
