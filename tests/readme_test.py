import pathlib
import re

_README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_the_example_runs_and_prints_a_loss(capsys):
  (example,) = re.findall(r'```python\n(.*?)```', _README.read_text(), re.S)
  assert sum(1 for line in example.splitlines() if line) <= 15

  exec(compile(example, str(_README), 'exec'), {'__name__': 'example'})

  value, shape = capsys.readouterr().out.split(maxsplit=1)
  assert float(value) > 0
  assert shape.strip() == '(256, 256)'


def test_the_programs_it_names_exist():
  table = _README.read_text().partition('## Programs')[2]
  first_cells = re.findall(r'^\| (`[^|]*) \|', table, re.M)[1:]
  names = re.findall(r'`([a-z_]+)[ `]', ' '.join(first_cells))
  programs = _README.parent / 'experiments'

  assert len(names) >= 7
  assert [n for n in names if not (programs / f'{n}.py').exists()] == []
