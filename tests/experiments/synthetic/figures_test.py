"""The figures of the synthetic tasks are drawn of rows as sweeps write them."""

import pytest

from experiments.synthetic import config as config_lib
from experiments.synthetic import configs
from experiments.synthetic import configs_regbench
from experiments.synthetic import configs_state
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


def test_regbench_tells_convolutions_apart_beside_the_published(monkeypatch):
  drawings = []
  monkeypatch.setattr(figures, '_save', lambda d, path: drawings.append(d))
  rows = [
    {
      'name': 'regbench',
      'mixer': 'delta_net',
      'accuracy': 0.9,
      'config': config_lib.as_dict(
        configs_regbench.run(num_train=size, use_short_conv=conv)
      ),
    }
    for size in (2_500, 5_000)
    for conv in (True, False)
  ]
  figures.draw('regbench', rows, '.')
  lines = {x.get_label(): x for x in drawings[0].axes[0].get_lines()}
  for name in ('delta_net', 'delta_net, no convolution'):
    assert list(lines[name].get_xdata()) == [2_500, 5_000]
    grey = lines[f'{name} (published)']
    assert list(grey.get_xdata()) == list(configs_regbench.SIZES)


def test_modular_arithmetic_stands_beside_the_published(monkeypatch):
  drawings = []
  monkeypatch.setattr(figures, '_save', lambda d, path: drawings.append(d))
  rows = [
    {
      'name': 'modular_arithmetic',
      'mixer': 'delta_net',
      'accuracy': 0.9,
      'by_position': [{'first': 0, 'last': 3, 'accuracy': 0.5}],
      'config': config_lib.as_dict(configs_state.modular_run(brackets=x)),
    }
    for x in (False, True)
  ]
  figures.draw('state_tracking', rows, '.')
  for panel, at_60 in zip(drawings[0].axes, (0.75, 0.73), strict=True):
    lines = {x.get_label(): x for x in panel.get_lines()}
    grey = lines['delta_net, beta in (0, 1) (published)']
    assert grey.get_ydata()[1] == pytest.approx(0.2 + 0.8 * at_60)


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


def test_a_mixer_looks_the_same_in_all_panels(monkeypatch):
  drawings = []
  monkeypatch.setattr(figures, '_save', lambda d, path: drawings.append(d))
  rows = [row for row in _rows() if row['name'] == 'mqar']
  # Of the longer rows one mixer alone has been run.
  rows = [r for i, r in enumerate(rows) if i < 4 or r['mixer'] == 'delta_net']
  figures.draw_mqar(rows, 'unused')
  colours = [
    line.get_color()
    for panel in drawings[0].axes
    for line in panel.get_lines()
    if line.get_label() == 'delta_net'
  ]
  assert len(colours) == 2 and len(set(colours)) == 1
  legend = [text.get_text() for text in drawings[0].legends[0].get_texts()]
  assert legend.count('delta_net') == 1
  assert 'retnet' in legend
