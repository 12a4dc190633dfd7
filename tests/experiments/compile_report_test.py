import json
import pathlib
import subprocess
import sys
import types

from absl import app
from absl import flags
import pytest

from experiments import ahead_of_time
from experiments import compile_report
from experiments import compile_tables
from experiments import pod_compilation
from tests.experiments import compile_tables_test


@pytest.fixture
def given(tmp_path, monkeypatch):
  values = types.SimpleNamespace(
    config='delta_net_340m',
    target=['h200:64'],
    json=False,
    suite=None,
    output=str(tmp_path / 'rows.jsonl'),
  )
  monkeypatch.setattr(flags, 'FLAGS', values)
  return values


@pytest.mark.parametrize('as_json', [True, False])
@pytest.mark.parametrize(
  'row', [compile_tables_test.ROW, compile_tables_test.LARGE]
)
def test_a_report_is_printed_and_fails_if_the_step_does_not_fit(
  monkeypatch, capsys, given, as_json, row
):
  given.json = as_json

  def report(target, config):
    assert (target, config.model.model_width) == ('h200:64', 1024)
    return row

  monkeypatch.setattr(pod_compilation, 'report', report)
  assert compile_report.main(['compile_report']) == (not row['fits'])
  printed = capsys.readouterr().out
  if as_json:
    assert json.loads(printed) == row
  else:
    assert printed.splitlines() == list(compile_tables.describe(row))


def test_a_suite_is_printed_line_by_line(monkeypatch, capsys, given):
  given.suite = 'models'

  def suite(output, machines):
    return [pathlib.Path(output).name, *machines]

  monkeypatch.setitem(compile_tables.SUITES, 'models', suite)
  assert compile_report.main(['compile_report']) == 0
  assert capsys.readouterr().out == 'rows.jsonl\nh200:64\n'


def test_what_is_not_installed_is_one_line(monkeypatch, given):
  def report(*_):
    raise ahead_of_time.ToolsMissingError('needs x: run `make setup_aot`')

  monkeypatch.setattr(pod_compilation, 'report', report)
  with pytest.raises(SystemExit, match='^error: needs x: run `make setup_aot`'):
    compile_report.main(['compile_report'])
  del given


def test_arguments_are_refused():
  with pytest.raises(app.UsageError, match='no arguments are taken'):
    compile_report.main(['compile_report', 'extra'])


def test_the_program_starts_and_knows_its_machines():
  command = [sys.executable, '-m', 'experiments.compile_report']
  found = subprocess.run(
    [*command, '--target=h300:8'], capture_output=True, text=True
  )
  assert found.returncode == 1
  assert 'must begin with one of v4, v5e, v5p, v6e, h200, ' in found.stderr
