import json
import types

from absl import app
from absl import flags
import pytest

from experiments import compare_peers
from experiments import peers


def test_the_gated_delta_rule_is_compared_at_both_sizes(
  tmp_path, monkeypatch, capsys
):
  cases = []

  def rows(case, *, repeats):
    cases.append(case)
    yield {
      'package': 'a',
      'package_version': None,
      'function': 'f',
      'shape': case.shape,
      'reason': f'repeats={repeats}',
    }

  output = tmp_path / 'new' / 'peers.jsonl'
  values = types.SimpleNamespace(output=str(output), repeats=3)
  monkeypatch.setattr(flags, 'FLAGS', values)
  monkeypatch.setattr(peers, 'rows', rows)
  compare_peers.main(['compare_peers'])
  assert {(c.op, c.gate, c.T, c.dtype) for c in cases} == {
    ('delta_rule', 'head', 2048, 'float32')
  }
  assert [case.K for case in cases] == [64, 128]
  written = [json.loads(line) for line in output.read_text().splitlines()]
  assert [row['shape']['K'] for row in written] == [64, 128]
  assert capsys.readouterr().out.count('not timed: repeats=3') == 2


def test_arguments_are_refused():
  with pytest.raises(app.UsageError, match='no arguments are taken'):
    compare_peers.main(['compare_peers', 'extra'])
