from matplotlib import figure
from matplotlib import image
import pytest

from experiments import throughput_figures


def _row(model, length, speed, **changes):
  return {
    'model': model,
    'size': '1b',
    'dtype': 'bfloat16',
    'length': length,
    'batch': 16384 // length,
    'tokens_per_s': speed,
    'paper_tokens_per_s': 40e3,
    'mfu': None if speed is None else 0.4,
    'device': '1 x H100',
  } | changes


def test_a_panel_per_model_has_the_papers_speeds_in_grey(tmp_path, monkeypatch):
  drawn = []
  save = figure.Figure.savefig

  def remember(self, *args, **kwargs):
    drawn.append(self)
    save(self, *args, **kwargs)

  monkeypatch.setattr(figure.Figure, 'savefig', remember)
  rows = [
    _row(model, length, speed)
    for model in ('delta_net', 'mamba')
    for length, speed in ((2048, 50e3), (4096, None), (8192, 60e3))
  ]
  path = tmp_path / 'throughput.png'
  throughput_figures.draw_throughput(rows, path)
  panels = drawn[0].axes
  assert [panel.get_title() for panel in panels] == ['delta net', 'mamba']
  _, paper, here = panels[0].lines
  assert paper.get_color() == '0.6' and list(paper.get_ydata()) == [40] * 3
  assert list(here.get_ydata()) == [50, 60]
  assert list(here.get_xdata()) == ['2048 x 8', '8192 x 2']
  assert [text.get_text() for text in panels[0].texts] == ['40%', '40%']
  assert image.imread(path).ndim == 3


def test_rows_must_be_of_one_device(tmp_path):
  rows = [_row('gla', 2048, 1.0), _row('gla', 4096, 1.0, device='other')]
  with pytest.raises(ValueError, match='must be of one device'):
    throughput_figures.draw_throughput(rows, tmp_path / 'x.png')
