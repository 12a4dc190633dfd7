import json

import jax
import pytest

from experiments import benchmarking
from pallas_kernels.delta_rule import arg_specs

SPEC = arg_specs.ArgSpec(name='small', B=1, T=64, H=1, HV=1, K=8, V=8)


def test_functions_take_turns_after_one_call_that_is_not_counted():
  calls = []
  functions = {
    'a': lambda: calls.append('a'),
    'b': lambda: calls.append('b'),
  }
  seconds = benchmarking.time_alternately(functions, repeats=3)
  assert calls == ['a', 'a', 'b', 'b'] * 3
  assert {name: len(times) for name, times in seconds.items()} == {
    'a': 3,
    'b': 3,
  }
  assert min(seconds['a'] + seconds['b']) >= 0


def test_no_repeats_are_refused():
  with pytest.raises(ValueError, match='repeats must be at least 1, got 0'):
    benchmarking.time_alternately({}, repeats=0)


def test_rows_hold_times_memory_ratios_and_origin():
  rows = list(benchmarking.rows([SPEC], repeats=3))
  assert [row['pass'] for row in rows] == ['forward', 'forward_backward']
  for row in rows:
    xla, recurrent = row['results']['xla'], row['results']['recurrent']
    assert row['speed_up'] == recurrent['median_ms'] / xla['median_ms']
    assert row['temp_ratio'] == recurrent['temp_bytes'] / xla['temp_bytes']
    for result in (xla, recurrent):
      assert 0 < result['min_ms'] <= result['median_ms']
    assert row['shape'] == {
      'name': 'small',
      'dtype': 'float32',
      'B': 1,
      'T': 64,
      'H': 1,
      'HV': 1,
      'K': 8,
      'V': 8,
    }
    assert row['versions']['jax'] == jax.__version__
    assert row['device'] and row['date'] and row['commit']
  # The token scan saves the state of every token, the chunks one in 32.
  assert rows[1]['temp_ratio'] > rows[0]['temp_ratio']
  assert rows[1]['results']['recurrent']['temp_bytes'] >= 64 * 8 * 8 * 4


def test_rows_read_back_and_print_under_the_header():
  rows = list(benchmarking.rows([SPEC], repeats=1))
  lines = benchmarking.to_lines(rows).splitlines()
  assert [json.loads(line) for line in lines] == rows
  line = benchmarking.format_row(rows[0])
  assert line.startswith('small ')
  assert len(line) == len(benchmarking.header())


def test_the_cpu_suite_has_both_widths():
  assert [(s.K, s.V, s.T) for s in benchmarking.SUITES['cpu']] == [
    (64, 64, 2048),
    (128, 128, 2048),
  ]
