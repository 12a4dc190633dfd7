import json
import types

from absl import app
from absl import flags
import pytest

from experiments import kernel_figures
from experiments import length_figures
from experiments import mixer_figures
from experiments import plot_results
from experiments.synthetic import figures as synthetic_figures
from experiments.synthetic import sweeping


@pytest.fixture(autouse=True)
def given(tmp_path, monkeypatch):
  values = types.SimpleNamespace(results=str(tmp_path), figure=None)
  monkeypatch.setattr(flags, 'FLAGS', values)
  return values


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


def test_a_named_figure_gets_the_rows_of_all_files(
  given, tmp_path, monkeypatch, capsys
):
  given.figure = 'mqar'
  monkeypatch.setattr(
    synthetic_figures, 'draw', lambda name, rows, at: (name, rows, at)
  )
  for name in ('a', 'b'):
    row = {'kind': sweeping.KIND, 'name': name}
    (tmp_path / f'{name}.jsonl').write_text(json.dumps(row) + '\n')
  plot_results.main(['plot_results'])
  rows = [{'kind': sweeping.KIND, 'name': name} for name in ('a', 'b')]
  assert capsys.readouterr().out == f'{("mqar", rows, tmp_path)}\n'


def test_the_figure_of_one_kind_alone(given, tmp_path, monkeypatch, capsys):
  given.figure = 'length'
  drawn = []
  monkeypatch.setattr(
    length_figures, 'draw_length', lambda *found: drawn.append(found)
  )
  for name, kind in (('a', 'length'), ('b', 'kernel')):
    (tmp_path / f'{name}.jsonl').write_text(json.dumps({'kind': kind}) + '\n')
  plot_results.main(['plot_results'])
  assert drawn == [([{'kind': 'length'}], tmp_path / 'a.png')]
  (tmp_path / 'a.jsonl').unlink()
  with pytest.raises(app.UsageError, match='has a row of length'):
    plot_results.main(['plot_results'])


def test_a_directory_without_results_is_refused():
  with pytest.raises(app.UsageError, match='no .jsonl file in'):
    plot_results.main(['plot_results'])


def test_arguments_are_refused():
  with pytest.raises(app.UsageError, match='no arguments are taken'):
    plot_results.main(['plot_results', 'extra'])
