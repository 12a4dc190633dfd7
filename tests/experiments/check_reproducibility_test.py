import dataclasses
import json
import types

from absl import app
from absl import flags
import pytest

from experiments import check_reproducibility
from experiments import reproducibility


class _Flags(types.SimpleNamespace):
  def __getitem__(self, name):
    return types.SimpleNamespace(value=getattr(self, name))


@pytest.fixture
def given(tmp_path, monkeypatch):
  values = _Flags(
    settings=['default'],
    output=str(tmp_path / 'new' / 'x.jsonl'),
    train=False,
    **dataclasses.asdict(reproducibility.Run(steps=3)),
  )
  monkeypatch.setattr(flags, 'FLAGS', values)
  return values


def test_a_row_per_setting_is_written(monkeypatch, given):
  monkeypatch.setattr(
    reproducibility, 'rows', lambda *found: iter([{'given': found[0].steps}])
  )
  monkeypatch.setattr(reproducibility, 'format_row', str)
  check_reproducibility.main(['check_reproducibility'])
  with open(given.output) as file:
    assert json.loads(file.read()) == {'given': 3}


def test_a_child_prints_what_it_trained(monkeypatch, capsys, given):
  given.train = True
  monkeypatch.setattr(
    reproducibility, 'train', lambda run: {'steps': run.steps}
  )
  check_reproducibility.main(['check_reproducibility'])
  assert json.loads(capsys.readouterr().out) == {'steps': 3}


def test_arguments_are_refused():
  with pytest.raises(app.UsageError, match='no arguments are taken'):
    check_reproducibility.main(['check_reproducibility', 'extra'])
