import json
import types

from absl import app
from absl import flags
import pytest

from experiments import kernel_compilation
from experiments import kernel_report
from tests.experiments import kernel_tables_test


@pytest.mark.parametrize('as_json', [True, False])
@pytest.mark.parametrize('is_broken', [True, False])
def test_rows_are_printed_and_written_and_broken_gates_counted(
  tmp_path, monkeypatch, capsys, as_json, is_broken
):
  row = kernel_tables_test.KERNEL
  row = row if is_broken else row | {'broken': []}
  output = tmp_path / 'new' / 'rows.jsonl'
  values = types.SimpleNamespace(
    target='h200', json=as_json, output=str(output)
  )
  monkeypatch.setattr(flags, 'FLAGS', values)
  monkeypatch.setattr(kernel_compilation, 'all_rows', lambda target: [row])
  assert kernel_report.main(['kernel_report']) == is_broken
  assert [json.loads(s) for s in output.read_text().splitlines()] == [row]
  printed = capsys.readouterr().out
  if as_json:
    assert json.loads(printed) == row
  else:
    assert ('BROKEN: wide' in printed) == is_broken


def test_arguments_are_refused():
  with pytest.raises(app.UsageError, match='no arguments are taken'):
    kernel_report.main(['kernel_report', 'extra'])
