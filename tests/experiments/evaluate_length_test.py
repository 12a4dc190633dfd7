import json
import types

from absl import app
from absl import flags
import pytest

from experiments import evaluate_length

pytestmark = pytest.mark.usefixtures('standard_promotion', 'cached_compilation')


@pytest.fixture
def given(finished_run, tmp_path, monkeypatch):
  values = types.SimpleNamespace(
    workdirs=[str(finished_run.root)],
    output=str(tmp_path / 'new' / 'length.jsonl'),
    times=2,
    max_scored=1,
  )
  monkeypatch.setattr(flags, 'FLAGS', values)
  return values


def test_a_finished_run_is_measured_up_to_a_multiple(given, capsys):
  evaluate_length.main(['evaluate_length'])
  with open(given.output) as file:
    rows = [json.loads(line) for line in file]
  assert [row['last'] for row in rows] == [16, 32, 48, 64]
  printed = capsys.readouterr().out.splitlines()
  for line, row in zip(printed, rows, strict=True):
    assert f'loss {row["loss"]:.4f}' in line


def test_what_cannot_be_done_is_one_line(given):
  given.workdirs = ['none']
  with pytest.raises(SystemExit, match='^error: none holds no run'):
    evaluate_length.main(['evaluate_length'])


def test_arguments_are_refused():
  with pytest.raises(app.UsageError, match='no arguments are taken'):
    evaluate_length.main(['evaluate_length', 'extra'])
