from matplotlib import figure
from matplotlib import image
import pytest

from experiments import benchmark_suites
from experiments import kernel_figures


def _row(suite, pass_name, speed_up, temp_ratio=1.0, **changes):
  shape = {'name': 'a', 'B': 1, 'T': 2048, 'HV': 4, 'K': 64, 'V': 64}
  shape |= {'dtype': 'float32'} | changes.pop('shape', {})
  return {
    'kind': 'kernel',
    'suite': suite,
    'op': 'delta_rule',
    'variant': 'plain',
    'pass': pass_name,
    'shape': shape,
    'speed_up': speed_up,
    'temp_ratio': temp_ratio,
    'device': '1 x cpu',
  } | changes


WIDE = {'K': 128, 'V': 128}
CPU = [
  _row('cpu', 'forward', 1.0, 2.0),
  _row('cpu', 'forward_backward', 10.0, 12.0),
  _row('cpu', 'forward', 3.0, 4.0, variant='g per head'),
  _row('cpu', 'forward_backward', 14.0, 30.0, variant='g per head'),
  _row('cpu', 'forward', 5.0, 6.0, shape=WIDE),
  _row('cpu', 'forward_backward', None, None, shape=WIDE),
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


def test_bars_of_every_op_and_pass_in_a_column_per_size(tmp_path, drawn):
  path = tmp_path / 'kernels.png'
  kernel_figures.draw_kernels(CPU, path)
  panels = drawn[0].axes
  assert [[bar.get_width() for bar in p.patches] for p in panels] == [
    [1, 3, 10, 14],
    [5],
    [2, 4, 12, 30],
    [6],
  ]
  labels = [label.get_text() for label in panels[0].get_yticklabels()]
  assert labels == ['delta rule\nplain', 'delta rule\ng per head']
  assert [panel.get_title() for panel in panels[:2]] == [
    'B 1, T 2048, H 4, K = V = 64, float32',
    'B 1, T 2048, H 4, K = V = 128, float32',
  ]
  assert image.imread(path).ndim == 3


def test_time_and_memory_by_length_beside_their_proportion(tmp_path, drawn):
  rows = [
    _row(
      'length',
      'forward_backward',
      None,
      None,
      variant=variant,
      shape={'T': length},
      results={'xla': {'median_ms': ms, 'temp_bytes': 2**20 * mib}},
    )
    for variant in ('plain', 'g per head')
    for length, ms, mib in ((1024, 5, 2), (2048, 10, 3))
  ]
  kernel_figures.draw_kernels(rows, tmp_path / 'length.png')
  time, memory = drawn[0].axes
  plain, head, proportion = time.lines
  assert plain.get_xydata().tolist() == [[1024, 5], [2048, 10]]
  assert head.get_label() == 'g per head'
  assert proportion.get_xydata().tolist() == [[1024, 5], [2048, 10]]
  assert memory.lines[0].get_ydata().tolist() == [2, 3]
  assert memory.lines[2].get_ydata().tolist() == [1.5, 3]


def test_the_paper_stands_in_grey_beside_what_was_run(tmp_path, drawn):
  lengths = {512: 4.0, 1024: 6.0, 2048: None}
  rows = [
    _row(
      'paper',
      'forward_backward',
      speed_up,
      shape={'T': length, 'K': 128},
      tokens=2048,
      model_width=256,
      compared=['recurrent', 'xla'],
    )
    for length, speed_up in lengths.items()
  ]
  kernel_figures.draw_kernels(rows, tmp_path / 'paper.png')
  assert '2048 tokens of width 256' in drawn[0].get_suptitle()
  panels = dict(zip((64, 128, 256), drawn[0].axes, strict=True))
  for dim, panel in panels.items():
    paper = panel.lines[0]
    assert paper.get_color() == '0.6'
    assert tuple(paper.get_ydata()) == kernel_figures.PAPER_SPEED_UPS[dim]
    low, high = panel.get_ylim()
    assert panel.get_yscale() == 'log' and low < 4.0 and high > 36.6
  assert panels[128].get_title() == 'head dimension 128, here by xla'
  _, here, missing = panels[128].lines
  assert here.get_xydata().tolist() == [[512, 4], [1024, 6]]
  assert list(missing.get_xdata()) == [2048]
  _, none = panels[64].lines
  assert not len(none.get_xdata())
  (legend,) = drawn[0].legends
  assert [text.get_text() for text in legend.get_texts()] == [
    'the paper, on its GPU',
    'here',
    'not run here: see the rows',
  ]


def test_the_paper_was_timed_at_the_sizes_of_the_suite():
  assert kernel_figures.PAPER_LENGTHS == benchmark_suites.PAPER_LENGTHS
  assert tuple(kernel_figures.PAPER_SPEED_UPS) == (
    benchmark_suites.PAPER_HEAD_DIMS
  )


@pytest.mark.parametrize(
  'rows',
  [
    [],
    [*CPU, _row('cpu', 'forward', 1.0, device='1 x gpu')],
    [*CPU, _row('length', 'forward', 1.0)],
  ],
)
def test_rows_must_be_of_one_suite_on_one_device(tmp_path, rows):
  message = 'the rows must be of one suite on one device'
  with pytest.raises(ValueError, match=message):
    kernel_figures.draw_kernels(rows, tmp_path / 'x.png')


def test_rows_of_an_unknown_suite_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"must be one of .*, got 'tpu'"):
    kernel_figures.draw_kernels(
      [_row('tpu', 'forward', 1.0)], tmp_path / 'x.png'
    )


def test_the_gpu_figure_has_a_bar_for_every_time_there_is():
  times = {'mosaic_gpu': {'median_ms': 2.0}, 'xla': {'reason': 'left out'}}
  rows = [
    _row('gpu', name, 1.0, results=times)
    for name in ('forward', 'forward_backward')
  ]
  drawing = kernel_figures._DRAW['gpu'](rows)
  assert [panel.get_title() for panel in drawing.axes] == [
    'forward',
    'forward + backward',
  ]
  widths = [bar.get_width() for bar in drawing.axes[0].patches]
  assert widths[0] == 2.0 and widths[1] != widths[1]
  # Not cut down to what tells the times apart, which look equal when they are.
  assert drawing.axes[0].get_xlim() == (1.0, 10.0)
