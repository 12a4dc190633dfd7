"""The figures of the synthetic tasks are drawn of rows as sweeps write them."""

import pytest

from experiments.synthetic import config as config_lib
from experiments.synthetic import configs
from experiments.synthetic import figures
from experiments.synthetic import sweeping


def _rows():
  for name in ('mqar_cpu', 'mad_cpu', 'parity_cpu', 'word_problem_cpu'):
    for i, run in enumerate(configs.SWEEPS[name]()):
      yield {
        'kind': sweeping.KIND,
        'name': run.name,
        'mixer': '+'.join(run.model.mixers),
        'accuracy': 0.1 * i,
        'by_position': [{'first': 0, 'last': 3, 'accuracy': 0.5}],
        'config': config_lib.as_dict(run),
      }


@pytest.mark.parametrize('name', ['mqar', 'mad', 'state_tracking'])
def test_a_figure_is_drawn(name, tmp_path):
  path = figures.draw(name, list(_rows()), tmp_path)
  assert path.read_bytes().startswith(b'\x89PNG')


def test_no_row_is_refused(tmp_path):
  with pytest.raises(ValueError, match='needs rows of regbench'):
    figures.draw('regbench', list(_rows()), tmp_path)


def test_the_best_rate_stands_for_a_line():
  rows = [row for row in _rows() if row['name'] == 'parity']
  found = figures.best(rows, by=figures.label)
  assert list(found) == [
    'delta_net, beta in (0, 1)',
    'delta_net, beta in (0, 2)',
  ]
  assert [row['accuracy'] for row in found.values()] == pytest.approx(
    [0.5, 0.2]
  )
