"""Times implementations of the ops against one another in one run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import math
import statistics
import time
from typing import Any, NamedTuple

import jax

from experiments import benchmark_cases
from experiments import benchmark_flops
from experiments import benchmark_programs
from experiments import benchmark_suites
from experiments import benchmark_timing
from experiments import fla_peer
from experiments import kernel_checks
from experiments import published_times
from experiments import result_rows

CHUNKWISE = 'xla'
BASELINE = 'recurrent'
HOPPER = 'mosaic_gpu'
# Fields of a row that say what it is about, of times or of a check.
ABOUT = (
  'kind',
  'suite',
  'op',
  'variant',
  'shape',
  'pass',
  'implementation',
  'cosine',
  'with_segments',
)

Row = result_rows.Row

_CHECKS_AT_A_TIME = 4


def _result(case, pass_name: str, arguments, seconds: Sequence[float]) -> Row:
  """Returns times and rates of the calls of one implementation."""
  median = statistics.median(seconds)
  rate = benchmark_flops.flops(case, pass_name) / median
  values = jax.eval_shape(
    benchmark_programs.pass_function(case.function, 'forward'),
    dict(arguments),
  )
  moved = benchmark_flops.compulsory_bytes(arguments, values, pass_name)
  return {
    'median_ms': 1e3 * median,
    'min_ms': 1e3 * min(seconds),
    'repeats': len(seconds),
    'flops_per_s': rate,
    'peak_share': rate / benchmark_timing.matmul_peak(case.dtype),
    'bytes_per_s': moved / median,
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
  """How long is measured.

  Attributes:
    repeats: the most timed calls of each.
    queue_seconds, row_seconds, slow_seconds: as of `benchmark_suites.Suite`.
  """

  repeats: int
  queue_seconds: float = 0.0
  row_seconds: float = 5.0
  slow_seconds: float = math.inf


def times(
  runs: Mapping[str, Callable[[int], Any]], effort: Effort
) -> dict[str, tuple[list[float], int]]:
  """Returns seconds of a call and the calls that were queued, by name.

  Args:
    runs: by name, what makes a number of calls and returns the last result.
    effort: how long is measured.
  """
  calls = {
    name: benchmark_timing.calls_within(
      functools.partial(run, 1), effort.queue_seconds
    )
    for name, run in runs.items()
  }
  seconds = benchmark_timing.time_alternately(
    {name: functools.partial(run, calls[name]) for name, run in runs.items()},
    repeats=effort.repeats,
    enough_seconds=effort.row_seconds,
    slow_seconds=effort.slow_seconds,
  )
  return {n: ([s / calls[n] for s in seconds[n]], calls[n]) for n in runs}


def measure_fla(
  case: benchmark_cases.Case,
  pass_name: str,
  effort: Effort,
  *,
  arguments: Mapping[str, jax.Array],
) -> Row:
  """Measures flash-linear-attention's kernels as `measure` does the op's."""
  run, reason = fla_peer.prepare(case, pass_name, arguments)
  if run is None:
    return {'reason': reason}
  ((seconds, calls),) = times({fla_peer.NAME: run}, effort).values()
  return _result(case, pass_name, arguments, seconds) | {'queued': calls}


class _Planned(NamedTuple):
  """What is timed, or why it cannot be."""

  case: benchmark_cases.Case
  pass_name: str
  arguments: Mapping[str, jax.Array]
  program: benchmark_programs.Program | str


def _measure(
  planned: Mapping[Any, _Planned], effort: Effort, memory_limit: int | None
) -> dict[Any, Row]:
  """Returns what was measured, all taking turns, by the keys of `planned`."""
  limit = memory_limit
  if limit is None:
    limit = benchmark_programs.memory_limit()
  runs, results = {}, {}
  for key, one in planned.items():
    call = one.program
    if not isinstance(call, str):
      call = benchmark_programs.first_run(call, one.arguments, limit)
    if isinstance(call, str):
      results[key] = {'reason': call}
    else:
      runs[key] = functools.partial(benchmark_timing.call_often, call)
  for key, (seconds, count) in times(runs, effort).items():
    case, pass_name, arguments, program = planned[key]
    results[key] = _result(case, pass_name, arguments, seconds) | {
      'queued': count,
      'temp_bytes': program.temp_bytes,
    }
  return {key: results[key] for key in planned}


def measure(
  case: benchmark_cases.Case,
  pass_name: str,
  effort: Effort,
  *,
  implementations: Sequence[str],
  memory_limit: int | None = None,
  arguments: Mapping[str, jax.Array] | None = None,
  programs: Mapping[tuple[str, str], Any] | None = None,
) -> dict[str, Row]:
  """Measures one pass of the implementations on one case.

  Args:
    case: what is called.
    pass_name: one of `benchmark_programs.PASSES`.
    effort: how long is measured.
    implementations: names.
    memory_limit: bytes above which nothing is run; None means the device's.
    arguments: of the case; None means that they are made.
    programs: what `benchmark_programs.compile_all` returned; None means that
      it is called.

  Returns:
    By implementation: `median_ms` and `min_ms` of `repeats` times of `queued`
    calls, `temp_bytes` as the compiler reports it, and over the median time
    `flops_per_s` (`benchmark_flops`), `peak_share` of `matmul_peak` and the
    compulsory `bytes_per_s`. Or only `reason`: why it could not run.
  """
  if case.problem:
    return {name: {'reason': case.problem} for name in implementations}
  arguments = case.arguments() if arguments is None else arguments
  if programs is None:
    programs = benchmark_programs.compile_all(
      case, (pass_name,), implementations, arguments
    )
  planned = {
    name: _Planned(case, pass_name, arguments, programs[pass_name, name])
    for name in implementations
  }
  return _measure(planned, effort, memory_limit)


def _ratio(results: Mapping[str, Row], names, field: str) -> float | None:
  """Returns baseline / the implementation; None where one is missing."""
  above, below = (results.get(n, {}) for n in names)
  if field not in above or field not in below:
    return None
  return above[field] / max(below[field], 1e-9)


def _compared(suite, results) -> tuple[str, str]:
  """Returns the implementations of the ratios: baseline / the other."""
  if suite.checked:
    return CHUNKWISE, HOPPER
  fastest = HOPPER if 'median_ms' in results.get(HOPPER, {}) else CHUNKWISE
  return BASELINE, fastest


def check_rows(suite: benchmark_suites.Suite) -> Iterator[Row]:
  """Yields a row per check of a suite's first implementation.

  Several are worked on at a time, as most of the time goes into compilation;
  but programs of several devices must start in the same order on all of them.

  Raises:
    kernel_checks.WrongResultError: after the row of a result that is wrong.
  """
  checks = [
    kernel_checks.Check(
      case=case,
      implementation=suite.implementations[0],
      cosine=cosine,
      with_segments=case.gate != 'none',  # Without, kernels know no decay.
      may_refuse=case.K > 128,
      parts=suite.checked_parts,
    )
    for case in suite.checked
    for cosine in (0.0, 0.9)
  ]
  at_a_time = _CHECKS_AT_A_TIME if suite.checked_parts == 1 else 1
  pool = futures.ThreadPoolExecutor(at_a_time)
  try:
    for row in pool.map(kernel_checks.row, checks):
      yield {'suite': suite.name} | row | result_rows.origin()
      kernel_checks.require_right(row)
  finally:
    pool.shutdown(cancel_futures=True)


def _results(suite, case, pass_name: str, effort, names, late, **options):
  """Returns results by implementation, those of FLA among them if checked."""
  left_out = names[1:] if late else []
  results = measure(
    case,
    pass_name,
    effort,
    implementations=[n for n in names if n not in left_out],
    **options,
  )
  reason = f'left out: {suite.enough_seconds:.0f} s had passed'
  results |= {name: {'reason': reason} for name in left_out}
  if suite.checked:
    results[fla_peer.NAME] = (
      {'reason': reason}
      if late
      else measure_fla(case, pass_name, effort, arguments=options['arguments'])
    )
  return results


def _row(suite, case, pass_name: str, results) -> Row:
  compared = _compared(suite, results)
  return {
    'kind': 'kernel',
    'suite': suite.name,
    **suite.settings,
    'op': case.op,
    'variant': case.variant,
    'pass': pass_name,
    'shape': case.shape,
    'flops': benchmark_flops.flops(case, pass_name),
    'matmul_flops_per_s': benchmark_timing.matmul_peak(case.dtype),
    'copy_bytes_per_s': (
      benchmark_timing.copy_peak() if suite.checked else None
    ),
    'compared': list(compared),
    'results': results,
    'speed_up': _ratio(results, compared, 'median_ms'),
    'temp_ratio': _ratio(results, compared, 'temp_bytes'),
    'fla_ratio': _ratio(results, (fla_peer.NAME, HOPPER), 'median_ms'),
    'published_ms': published_times.milliseconds(case, pass_name),
    **result_rows.origin(),
  }


def _passes(suite, case) -> list[str]:
  """Returns the suite's passes and those with a published time."""
  return [
    name
    for name in benchmark_programs.PASSES
    if name in suite.passes or published_times.milliseconds(case, name)
  ]


def _rows_of_turns(suite, effort: Effort) -> Iterator[Row]:
  """Yields the rows of a suite whose cases take turns."""
  (pass_name,), (name,) = suite.passes, suite.implementations
  planned = {}
  for case in suite.cases:
    arguments = case.arguments()
    programs = benchmark_programs.compile_all(
      case, (pass_name,), (name,), arguments
    )
    program = programs[pass_name, name]
    planned[case] = _Planned(case, pass_name, arguments, program)
  for case, found in _measure(planned, effort, None).items():
    yield _row(suite, case, pass_name, {name: found})


def rows(suite: benchmark_suites.Suite, *, repeats: int) -> Iterator[Row]:
  """Yields the checks, then a row per case and pass; ratios can be None."""
  begin = time.perf_counter()
  effort = Effort(
    repeats=repeats,
    queue_seconds=suite.queue_seconds,
    row_seconds=suite.row_seconds,
    slow_seconds=suite.slow_seconds,
  )
  if suite.cases_take_turns:
    yield from _rows_of_turns(suite, effort)
    return
  yield from check_rows(suite)
  for case in suite.cases:
    names = list(suite.implementations or ()) or [
      name
      for name, reason in benchmark_cases.OPS[case.op].explain()
      if reason is None
    ]
    late = time.perf_counter() - begin > suite.enough_seconds
    passes = _passes(suite, case)
    arguments = programs = None
    if not case.problem:
      arguments = case.arguments()
      programs = benchmark_programs.compile_all(
        case, passes, names[:1] if late else names, arguments
      )
    for pass_name in passes:
      late = late or time.perf_counter() - begin > suite.enough_seconds
      results = _results(
        suite,
        case,
        pass_name,
        effort,
        names,
        late,
        arguments=arguments,
        programs=programs,
      )
      yield _row(suite, case, pass_name, results)
