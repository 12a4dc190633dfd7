import json
import types

from absl import app
from absl import flags
import pytest

from experiments import kernel_figures
from experiments import mixer_figures
from experiments import plot_results


@pytest.fixture(autouse=True)
def given(tmp_path, monkeypatch):
  values = types.SimpleNamespace(results=str(tmp_path))
  monkeypatch.setattr(flags, 'FLAGS', values)


def test_a_figure_is_drawn_beside_every_file_with_known_rows(
  tmp_path, monkeypatch, capsys
):
  drawn = []

  def draw(rows, path):
    drawn.append((rows, path))

  monkeypatch.setattr(kernel_figures, 'draw_kernels', draw)
  monkeypatch.setattr(mixer_figures, 'draw_mixers', draw)
  for name, kind in (('a', 'kernel'), ('b', 'peer'), ('c', 'mixer')):
    (tmp_path / f'{name}.jsonl').write_text(json.dumps({'kind': kind}) + '\n')
  plot_results.main(['plot_results'])
  a, c = tmp_path / 'a.png', tmp_path / 'c.png'
  assert drawn == [([{'kind': 'kernel'}], a), ([{'kind': 'mixer'}], c)]
  assert capsys.readouterr().out == f'wrote {a}\nwrote {c}\n'


def test_a_directory_without_results_is_refused():
  with pytest.raises(app.UsageError, match='no .jsonl file in'):
    plot_results.main(['plot_results'])


def test_arguments_are_refused():
  with pytest.raises(app.UsageError, match='no arguments are taken'):
    plot_results.main(['plot_results', 'extra'])
