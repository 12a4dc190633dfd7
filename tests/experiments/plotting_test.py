import math

from matplotlib import figure
from matplotlib import image
import numpy as np
import pytest

from experiments import plotting


def _rows(steps=400):
  noise = np.random.default_rng(0).normal(0, 0.08, steps + 1)
  rows = [
    {
      'kind': 'train',
      'step': step,
      'loss': 1.4 + 4 * math.exp(-step / 40) + float(noise[step]),
    }
    for step in range(1, steps + 1)
  ]
  return rows + [
    {
      'kind': 'eval',
      'step': step,
      'bits_per_byte': 2 + 4 * math.exp(-step / 60),
    }
    for step in range(0, steps + 1, 50)
  ]


@pytest.fixture
def drawn(monkeypatch):
  """Collects the figures that are saved."""
  figures = []
  save = figure.Figure.savefig

  def keep(drawing, *args, **kwargs):
    figures.append(drawing)
    save(drawing, *args, **kwargs)

  monkeypatch.setattr(figure.Figure, 'savefig', keep)
  return figures


def test_both_curves_and_the_references_are_drawn(tmp_path, drawn):
  path = tmp_path / 'loss.png'
  references = {'zlib': 2.6, 'xz': 2.1}
  plotting.draw_loss(_rows(), path, held_out=1.9, references=references)
  training, evaluation = drawn[0].axes
  assert len(training.lines[0].get_xdata()) == 400
  curve, star, *lines = evaluation.lines
  assert list(curve.get_xdata()) == list(range(0, 401, 50))
  assert star.get_xydata().tolist() == [[400, 1.9]]
  assert [line.get_ydata()[0] for line in lines] == [2.6, 2.1]
  assert [text.get_text() for text in evaluation.texts] == [
    'validation 2.005, held-out 1.900 (star)',
    'zlib 2.600',
    'xz 2.100',
  ]
  assert image.imread(path).shape[:2] == (960, 1125)


def test_points_that_are_not_finite_are_left_out(tmp_path, drawn):
  rows = [
    {'kind': 'train', 'step': step, 'loss': loss}
    for step, loss in ((3, 1.0), (1, 2.0), (2, math.nan), (4, math.inf))
  ]
  plotting.draw_loss(rows, tmp_path / 'loss.png')
  (panel,) = drawn[0].axes
  assert panel.lines[0].get_xydata().tolist() == [[1, 2.0], [3, 1.0]]


def test_validation_alone_is_drawn(tmp_path, drawn):
  rows = [{'kind': 'eval', 'step': 0, 'bits_per_byte': 8.0}]
  plotting.draw_loss(rows, tmp_path / 'loss.png')
  (panel,) = drawn[0].axes
  assert [text.get_text() for text in panel.texts] == ['validation 8.000']


def test_the_smooth_line_is_the_mean_of_its_window(tmp_path, drawn):
  rows = [
    {'kind': 'train', 'step': step, 'loss': loss}
    for step, loss in enumerate((3.0, 6.0, 9.0, 3.0))
  ]
  plotting.draw_loss(rows, tmp_path / 'loss.png')
  smooth = drawn[0].axes[0].lines[1].get_ydata()
  np.testing.assert_allclose(smooth, [4.5, 6, 6, 6])


def test_nothing_to_draw_leaves_the_old_picture(tmp_path):
  path = tmp_path / 'loss.png'
  path.write_bytes(b'old')
  with pytest.raises(ValueError, match='among 1 rows'):
    plotting.draw_loss([{'kind': 'train', 'step': 1, 'loss': math.nan}], path)
  assert path.read_bytes() == b'old'
