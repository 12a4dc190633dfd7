import json

from matplotlib import figure
from matplotlib import image
import pytest

from experiments import kernel_figures


def _row(name, pass_name, speed_up, temp_ratio, device='1 x cpu'):
  shape = {'name': name, 'B': 1, 'T': 2048, 'HV': 4, 'K': 64}
  return {
    'kind': 'kernel',
    'pass': pass_name,
    'shape': shape,
    'speed_up': speed_up,
    'temp_ratio': temp_ratio,
    'device': device,
  }


ROWS = [
  _row('a', 'forward', 1.0, 2.0),
  _row('a', 'forward_backward', 10.0, 12.0),
  _row('b', 'forward', 3.0, 4.0),
  _row('b', 'forward_backward', 14.0, 30.0),
]


def test_a_bar_per_shape_and_pass(tmp_path, monkeypatch):
  saved = []
  save = figure.Figure.savefig

  def keep(drawing, *args, **kwargs):
    saved.append(drawing)
    save(drawing, *args, **kwargs)

  monkeypatch.setattr(figure.Figure, 'savefig', keep)
  path = tmp_path / 'kernels.png'
  kernel_figures.draw_kernels(ROWS, path)
  speed, memory = saved[0].axes
  assert [bar.get_height() for bar in speed.patches] == [1, 3, 10, 14]
  assert [bar.get_height() for bar in memory.patches] == [2, 4, 12, 30]
  labels = [label.get_text() for label in speed.get_xticklabels()]
  assert labels == ['a\nB1 T2048 H4 K64', 'b\nB1 T2048 H4 K64']
  assert image.imread(path).shape[:2] == (570, 1350)


def test_rows_of_other_kinds_are_left_out(tmp_path):
  path = tmp_path / 'x.jsonl'
  lines = [*ROWS, {'kind': 'train', 'step': 1}]
  path.write_text(''.join(json.dumps(row) + '\n' for row in lines))
  assert kernel_figures.read_rows(path) == ROWS


@pytest.mark.parametrize(
  ('line', 'message'),
  [('{"kind": ', 'line 2: not JSON'), ('3', 'line 2: must be a JSON object')],
)
def test_a_damaged_line_is_refused(tmp_path, line, message):
  path = tmp_path / 'x.jsonl'
  path.write_text(f'{json.dumps(ROWS[0])}\n{line}\n')
  with pytest.raises(ValueError, match=message):
    kernel_figures.read_rows(path)


@pytest.mark.parametrize(
  'rows', [[], [*ROWS, _row('c', 'forward', 1.0, 1.0, '1 x gpu')]]
)
def test_rows_must_be_of_one_device(tmp_path, rows):
  with pytest.raises(ValueError, match='the rows must be of one device'):
    kernel_figures.draw_kernels(rows, tmp_path / 'x.png')
