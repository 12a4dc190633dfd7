import itertools
import math
import time

import pytest

from experiments import benchmark_timing


def test_functions_take_turns_after_two_calls_that_are_not_counted():
  calls = []
  functions = {
    'a': lambda: calls.append('a'),
    'b': lambda: calls.append('b'),
  }
  seconds = benchmark_timing.time_alternately(functions, repeats=3)
  assert calls == ['a', 'a', 'a', 'b', 'b', 'b'] * 3
  assert {name: len(times) for name, times in seconds.items()} == {
    'a': 3,
    'b': 3,
  }
  assert min(seconds['a'] + seconds['b']) >= 0


@pytest.mark.parametrize(
  ('repeats', 'enough', 'turns'), [(9, 0, 5), (9, math.inf, 9), (2, 0, 2)]
)
def test_turns_end_after_the_fifth_when_enough_time_has_passed(
  repeats, enough, turns
):
  seconds = benchmark_timing.time_alternately(
    {'a': lambda: None}, repeats=repeats, enough_seconds=enough
  )
  assert len(seconds['a']) == turns


def test_no_repeats_are_refused():
  with pytest.raises(ValueError, match='repeats must be at least 1, got 0'):
    benchmark_timing.time_alternately({}, repeats=0)


def test_what_is_slow_takes_three_turns_and_is_not_called_beforehand(
  monkeypatch,
):
  clock = itertools.count()
  monkeypatch.setattr(time, 'perf_counter', lambda: 0.5 * next(clock))
  calls = []
  functions = {
    'slow': lambda: calls.append('slow') or next(clock) and next(clock),
    'fast': lambda: calls.append('fast'),
  }
  seconds = benchmark_timing.time_alternately(
    functions, repeats=5, slow_seconds=0.9
  )
  assert {name: len(times) for name, times in seconds.items()} == {
    'slow': 3,
    'fast': 5,
  }
  assert (calls.count('slow'), calls.count('fast')) == (5, 15)


def test_calls_are_made_as_often_as_asked():
  calls = []

  def function():
    calls.append(1)
    return len(calls)

  assert benchmark_timing.call_often(function, 3) == 3
