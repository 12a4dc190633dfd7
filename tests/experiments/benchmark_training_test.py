import json
import subprocess
import sys
import types

from absl import app
from absl import flags
import pytest

from experiments import benchmark_training
from experiments import mixer_benchmark


class _Flags(types.SimpleNamespace):
  def __getitem__(self, name):
    return types.SimpleNamespace(value=getattr(self, name))


@pytest.fixture
def given(tmp_path, monkeypatch):
  values = _Flags(
    suite='mixers',
    mixers=['gla', 'mamba'],
    output=str(tmp_path / 'new' / 'mixers.jsonl'),
    model_width=16,
    num_layers=2,
    num_heads=2,
    batch=1,
    length=8,
  )
  monkeypatch.setattr(flags, 'FLAGS', values)
  return values


def test_a_row_per_mixer_is_printed_and_written(
  tmp_path, monkeypatch, capsys, given
):
  def measure(mixer, sizes):
    assert (sizes.model_width, sizes.length) == (16, 8)
    speeds = dict.fromkeys(
      ('trained_tokens_per_s', 'decoded_tokens_per_s'), 1.0
    )
    return {'mixer': mixer, 'parameters': 1, 'state_bytes': 2, **speeds}

  monkeypatch.setattr(mixer_benchmark, 'measure', measure)
  benchmark_training.main(['benchmark_training'])
  lines = (tmp_path / 'new' / 'mixers.jsonl').read_text().splitlines()
  assert [json.loads(line)['mixer'] for line in lines] == given.mixers
  assert len(capsys.readouterr().out.splitlines()) == 3


def test_unknown_mixers_are_refused(given):
  given.mixers = ['gla', 'glaa']
  with pytest.raises(ValueError, match=r"got \['glaa'\]"):
    benchmark_training.main(['benchmark_training'])


def test_arguments_are_refused():
  with pytest.raises(app.UsageError, match='no arguments are taken'):
    benchmark_training.main(['benchmark_training', 'extra'])


def test_the_program_starts_and_knows_its_mixers():
  command = [sys.executable, '-m', 'experiments.benchmark_training']
  found = subprocess.run(
    [*command, '--mixers=mambo'], capture_output=True, text=True
  )
  assert found.returncode == 1
  assert "got ['mambo']" in found.stdout + found.stderr
