from matplotlib import figure
from matplotlib import image
import numpy as np
import pytest

from experiments import length_figures


def _row(run, first, last, loss, **changes):
  return {
    'run': run,
    'first': first,
    'last': last,
    'loss': loss,
    'standard_error': 0.25,
    'change': loss - 2,
    'change_standard_error': 0.125,
    'training_length': 8,
    'documents': 3,
    'corpus': 'c',
  } | changes


def _rows(run, last_loss):
  bounds = ((1, 4), (5, 8), (9, 16), (17, 24), (25, 32))
  losses = (3, 2, 2, 2, last_loss)
  return [_row(run, *b, x) for b, x in zip(bounds, losses, strict=True)]


@pytest.fixture
def drawn(monkeypatch):
  found = []
  save = figure.Figure.savefig

  def remember(self, *args, **kwargs):
    found.append(self)
    save(self, *args, **kwargs)

  monkeypatch.setattr(figure.Figure, 'savefig', remember)
  return found


def test_a_line_and_a_band_per_run_by_position(drawn, tmp_path):
  path = tmp_path / 'length.png'
  rows = _rows('delta_net', 2) + _rows('attention', 7)
  length_figures.draw_length(rows[::-1], path)
  assert image.imread(path).ndim == 3
  loss, change = drawn[0].axes
  for panel, base, error in ((loss, 0, 0.25), (change, 2, 0.125)):
    *lines, trained = panel.lines
    ends = {line.get_label(): line.get_ydata()[-1] for line in lines}
    assert ends == {'attention': 7 - base, 'delta_net': 2 - base}
    np.testing.assert_allclose(
      lines[0].get_xdata(), [2.5, 6.5, 12.5, 20.5, 28.5]
    )
    assert list(trained.get_xdata()) == [8, 8]
    assert list(panel.get_xticks()) == [2, 4, 8, 16, 32]
    assert panel.get_xscale() == 'log'
    for band, line in zip(panel.collections, lines, strict=True):
      heights = band.get_paths()[0].vertices[:, 1]
      assert heights.max() == max(line.get_ydata()) + error
  assert (loss.get_yscale(), change.get_yscale()) == ('linear', 'symlog')
  names = [text.get_text() for text in loss.get_legend().get_texts()]
  assert names == list(ends)
  assert '3 documents' in drawn[0].get_suptitle()


def test_unknown_errors_have_no_height(drawn, tmp_path):
  rows = [row | {'standard_error': None} for row in _rows('a', 2)]
  length_figures.draw_length(rows, tmp_path / 'x.png')
  (band,) = drawn[0].axes[0].collections
  assert band.get_paths()[0].vertices[:, 1].max() == 3


@pytest.mark.parametrize('change', [{'training_length': 16}, {'corpus': 'd'}])
def test_rows_must_be_of_one_training_length_and_corpus(tmp_path, change):
  rows = _rows('a', 2) + [_row('b', 1, 4, 2.0, **change)]
  for given in (rows, []):
    with pytest.raises(ValueError, match='one training length and corpus'):
      length_figures.draw_length(given, tmp_path / 'x.png')
