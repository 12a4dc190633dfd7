import types

from absl import app
from absl import flags
import pytest

from experiments import benchmark_cases
from experiments import benchmark_kernels
from experiments import benchmark_suites
from experiments import benchmark_tables
from experiments import benchmark_timing
from experiments import result_rows


def _tiny_suite(name, *, tokens, model_width, only):
  assert (tokens, model_width) == (128, 16)
  cases = tuple(
    benchmark_cases.Case(op='delta_rule', name='x', B=1, T=T, H=1, K=8, V=8)
    for T in (16, 128)
    if not only or str(T) in only
  )
  return benchmark_suites.Suite(
    name=name,
    cases=cases,
    implementations=('xla',),
    cases_take_turns=name == 'length',
  )


@pytest.fixture
def given(tmp_path, monkeypatch):
  """Flags of a tiny suite."""
  values = types.SimpleNamespace(
    suite='cpu',
    output=str(tmp_path / 'new' / 'kernels.jsonl'),
    repeats=1,
    tokens=128,
    model_width=16,
    tune=False,
    only=[],
  )
  monkeypatch.setattr(flags, 'FLAGS', values)
  monkeypatch.setattr(benchmark_suites, 'suite', _tiny_suite)
  monkeypatch.setattr(benchmark_timing, 'PEAK_SIZE', 64)
  return values


@pytest.mark.parametrize('suite', ['length', 'cpu'])
def test_rows_are_printed_and_written(given, capsys, suite):
  given.suite = suite
  benchmark_kernels.main(['benchmark_kernels'])
  header, first, second, *growth = capsys.readouterr().out.splitlines()
  assert header == benchmark_tables.header()
  assert first.split()[:2] == second.split()[:2] == ['delta_rule', 'plain']
  rows = result_rows.read(given.output, kind='kernel')
  assert [row['shape']['T'] for row in rows] == [16, 128]
  assert [line.startswith('delta_rule plain, T = 16:') for line in growth] == (
    [True] if suite == 'length' else []
  )


def test_rows_of_sizes_that_are_left_out_stay(given):
  benchmark_kernels.main(['benchmark_kernels'])
  first = result_rows.read(given.output)
  given.only = ['16']
  benchmark_kernels.main(['benchmark_kernels'])
  changed = result_rows.read(given.output)
  assert [row['shape'] for row in changed] == [row['shape'] for row in first]
  assert changed[0]['results'] != first[0]['results']
  assert changed[1:] == first[1:]


def test_arguments_are_refused():
  with pytest.raises(app.UsageError, match='no arguments are taken'):
    benchmark_kernels.main(['benchmark_kernels', 'extra'])
