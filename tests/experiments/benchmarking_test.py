from concurrent import futures
import dataclasses
import json

import jax
import pytest

from experiments import benchmark_cases
from experiments import benchmark_flops
from experiments import benchmark_suites
from experiments import benchmark_tables
from experiments import benchmark_timing
from experiments import benchmarking
from experiments import fla_peer
from experiments import kernel_checks
from experiments import published_times

SIZES = {'name': 'small', 'B': 1, 'T': 64, 'H': 1, 'K': 8, 'V': 8}
CASE = benchmark_cases.Case(op='delta_rule', **SIZES)
EFFORT = benchmarking.Effort(repeats=1)
SUITE = benchmark_suites.Suite(
  name='cpu', cases=(CASE,), passes=('forward', 'forward_backward')
)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
  monkeypatch.setattr(benchmark_timing, 'PEAK_SIZE', 64)
  yield


def test_rows_hold_times_memory_rates_ratios_and_origin():
  rows = list(benchmarking.rows(SUITE, repeats=3))
  assert [row['pass'] for row in rows] == ['forward', 'forward_backward']
  for row in rows:
    xla, recurrent = row['results']['xla'], row['results']['recurrent']
    assert row['speed_up'] == recurrent['median_ms'] / xla['median_ms']
    assert row['temp_ratio'] == recurrent['temp_bytes'] / xla['temp_bytes']
    assert row['flops'] == benchmark_flops.flops(CASE, row['pass'])
    for result in (xla, recurrent):
      assert 0 < result['min_ms'] <= result['median_ms']
      assert result['repeats'] == 3
      rate = row['flops'] / (1e-3 * result['median_ms'])
      assert result['flops_per_s'] == pytest.approx(rate)
      share = result['flops_per_s'] / row['matmul_flops_per_s']
      assert result['peak_share'] == pytest.approx(share)
    assert row['shape'] == SIZES | {'HV': 1, 'dtype': 'float32'}
    assert (row['op'], row['variant']) == ('delta_rule', 'plain')
    assert row['versions']['jax'] == jax.__version__
    assert row['device'] and row['date'] and row['commit']
  # The token scan saves the state of every token, the chunks one in 32.
  assert rows[1]['temp_ratio'] > rows[0]['temp_ratio']
  assert rows[1]['results']['recurrent']['temp_bytes'] >= 64 * 8 * 8 * 4


def test_rows_read_back_and_print_under_the_header():
  rows = list(benchmarking.rows(SUITE, repeats=1))
  assert [json.loads(json.dumps(row)) for row in rows] == rows
  chunkwise, scan = benchmark_tables.format_row(rows[0])
  assert chunkwise.split()[:5] == 'delta_rule plain small forward xla'.split()
  assert scan.split()[4] == 'recurrent'
  assert len(chunkwise) == len(scan) == len(benchmark_tables.header())


def test_what_does_not_fit_memory_is_a_reason():
  results = benchmarking.measure(
    CASE,
    'forward_backward',
    EFFORT,
    implementations=('recurrent',),
    memory_limit=1,
  )
  assert results['recurrent'] == {
    'reason': 'it needs 0.0 GiB of memory, the device has 0.0'
  }


def test_an_allocation_that_fails_is_a_reason(monkeypatch):
  def fail(*, implementation, **arguments):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(benchmark_cases.Case, 'function', staticmethod(fail))
  arguments = {'implementations': ['xla']}
  message = 'RESOURCE_EXHAUSTED: no 9 GiB\nframes'
  assert benchmarking.measure(CASE, 'forward', EFFORT, **arguments) == {
    'xla': {'reason': 'RESOURCE_EXHAUSTED: no 9 GiB'}
  }
  message = 'INTERNAL: broken'
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL: broken'):
    benchmarking.measure(CASE, 'forward', EFFORT, **arguments)


def test_a_case_without_rows_prints_its_reason_and_has_no_ratio():
  case = benchmark_cases.Case(op='delta_rule', **SIZES | {'B': 0})
  suite = benchmark_suites.Suite(
    name='paper', cases=(case,), settings={'tokens': 32}
  )
  (row,) = benchmarking.rows(suite, repeats=1)
  reason = 'the tokens in all make no row of T=64'
  assert row['results'] == {n: {'reason': reason} for n in ('xla', 'recurrent')}
  assert (row['speed_up'], row['temp_ratio'], row['tokens']) == (None, None, 32)
  assert all(line.endswith(reason) for line in benchmark_tables.format_row(row))


CHECKED = benchmark_suites.Suite(
  name='gpu',
  cases=(CASE,),
  implementations=('xla', 'recurrent'),
  checked=(
    benchmark_cases.Case(op='delta_rule', **SIZES | {'dtype': 'bfloat16'}),
  ),
  queue_seconds=0.01,
)


@pytest.fixture
def small_copy(monkeypatch):
  monkeypatch.setattr(benchmark_timing, 'COPY_SIZE', 1024)
  benchmark_timing.copy_peak.cache_clear()
  yield
  benchmark_timing.copy_peak.cache_clear()


@pytest.mark.usefixtures('small_copy')
def test_a_checked_suite_is_checked_then_timed_beside_a_peer(monkeypatch):
  monkeypatch.setattr(
    fla_peer, 'prepare', lambda *_: (lambda calls: None, None)
  )
  *checks, row = benchmarking.rows(CHECKED, repeats=1)
  assert [(c['cosine'], c['identical']) for c in checks] == [
    (0.0, True),
    (0.9, True),
  ]
  assert list(row['results']) == ['xla', 'recurrent', 'fla']
  assert row['results']['xla']['queued'] > 1
  assert 0 < row['results']['xla']['bytes_per_s']
  assert 0 < row['copy_bytes_per_s']
  assert row['fla_ratio'] is None  # There are no kernels here to compare.


@pytest.mark.parametrize(('parts', 'at_a_time'), [(1, 4), (2, 1)])
def test_only_checks_on_one_device_are_made_together(
  monkeypatch, parts, at_a_time
):
  workers = []

  class Pool(futures.ThreadPoolExecutor):
    def __init__(self, most):
      workers.append(most)
      super().__init__(most)

  monkeypatch.setattr(futures, 'ThreadPoolExecutor', Pool)
  suite = dataclasses.replace(CHECKED, cases=(), checked_parts=parts)
  rows = list(benchmarking.rows(suite, repeats=1))
  assert [row['parts'] for row in rows] == [parts, parts]
  assert workers == [at_a_time]


def test_ratios_are_of_the_kernels_where_they_ran():
  suite = benchmark_suites.suite('paper')
  times = {'recurrent': {'median_ms': 6.0}, 'xla': {'median_ms': 3.0}}
  reason = {'mosaic_gpu': {'reason': 'K is 256'}}
  assert benchmarking._compared(suite, times | reason) == ('recurrent', 'xla')
  times['mosaic_gpu'] = {'median_ms': 2.0}
  compared = benchmarking._compared(suite, times)
  assert benchmarking._ratio(times, compared, 'median_ms') == 3


@pytest.mark.usefixtures('small_copy')
def test_a_published_time_stands_beside_a_pass_of_its_own(monkeypatch):
  published = {'backward': 0.5}
  monkeypatch.setattr(
    published_times, 'milliseconds', lambda case, name: published.get(name)
  )
  suite = dataclasses.replace(SUITE, passes=('forward',))
  forward, backward = benchmarking.rows(suite, repeats=1)
  assert (forward['pass'], forward['published_ms']) == ('forward', None)
  assert (backward['pass'], backward['published_ms']) == ('backward', 0.5)
  line = next(benchmark_tables.format_row(backward))
  assert line.split()[-1] == '0.500'


def test_a_wrong_result_stops_before_timing(monkeypatch):
  monkeypatch.setattr(kernel_checks, '_is_identical', lambda *_: False)
  rows = benchmarking.rows(CHECKED, repeats=1)
  assert next(rows)['kind'] == 'kernel_check'
  with pytest.raises(kernel_checks.WrongResultError):
    next(rows)


@pytest.mark.usefixtures('small_copy')
def test_when_time_is_up_only_the_first_is_timed():
  suite = dataclasses.replace(CHECKED, enough_seconds=0.0)
  *_, row = benchmarking.rows(suite, repeats=1)
  assert 'median_ms' in row['results']['xla']
  reason = {'reason': 'left out: 0 s had passed'}
  assert row['results']['recurrent'] == row['results']['fla'] == reason


def test_cases_of_one_implementation_take_turns(monkeypatch):
  called = []

  def time_alternately(functions, **unused_options):
    called.append(list(functions))
    return {name: [1.0] for name in functions}

  monkeypatch.setattr(benchmark_timing, 'time_alternately', time_alternately)
  cases = tuple(
    benchmark_cases.Case(op='delta_rule', name='x', B=1, T=T, H=1, K=8, V=8)
    for T in (8, 16)
  )
  suite = benchmark_suites.Suite(
    name='length', cases=cases, implementations=('xla',), cases_take_turns=True
  )
  monkeypatch.setattr(benchmark_timing, 'matmul_peak', lambda dtype: 1.0)
  rows = list(benchmarking.rows(suite, repeats=1))
  assert called == [list(cases)]
  assert [row['shape']['T'] for row in rows] == [8, 16]
  assert all(row['results']['xla']['median_ms'] == 1e3 for row in rows)
