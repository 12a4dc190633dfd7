"""Times implementations of the ops against one another in one run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import datetime
import functools
import json
import math
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments import benchmark_cases
from experiments import benchmark_flops
from experiments import environment

PASSES = ('forward', 'forward_backward')
CHUNKWISE = 'xla'
BASELINE = 'recurrent'
FEWEST_TURNS = 5
PEAK_SIZE = 2048
MOST_GROWTH = 8.8

Row = dict[str, Any]

# A row's calls are repeated until this long has passed, and 5 times at least.
_SECONDS_PER_ROW = 5.0
_COLUMNS = (
  ('op', '<24'),
  ('variant', '<15'),
  ('sizes', '<16'),
  ('pass', '<18'),
  ('by', '<10'),
  ('median ms', '>11'),
  ('min ms', '>11'),
  ('temp MiB', '>10'),
  ('GFLOP/s', '>9'),
  ('of peak', '>8'),
  ('speed-up', '>9'),
)


def time_alternately(
  functions: Mapping[str, Callable[[], Any]],
  *,
  repeats: int,
  enough_seconds: float = math.inf,
) -> dict[str, list[float]]:
  """Returns the seconds of each call, the functions taking turns.

  Taking turns, all of them meet the same state of the machine. In each turn a
  call that is not counted comes first: the caches and the pages of memory are
  then its own and not those of the function before.

  Args:
    functions: what is called, by name.
    repeats: the most turns.
    enough_seconds: once these have passed, turns end after the fifth.

  Raises:
    ValueError: `repeats` is below 1.
  """
  if repeats < 1:
    raise ValueError(f'repeats must be at least 1, got {repeats}')
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  begin = time.perf_counter()
  for turn in range(repeats):
    has_enough = time.perf_counter() - begin >= enough_seconds
    if turn >= FEWEST_TURNS and has_enough:
      break
    for name, function in functions.items():
      jax.block_until_ready(function())
      start = time.perf_counter()
      jax.block_until_ready(function())
      seconds[name].append(time.perf_counter() - start)
  return seconds


@functools.cache
def matmul_peak(dtype: str) -> float:
  """Returns the FLOP/s of the fastest of 5 products of 2048^2 matrices."""
  x = jnp.ones((PEAK_SIZE, PEAK_SIZE), jnp.dtype(dtype))
  product = jax.jit(functools.partial(jnp.dot, precision='highest'))
  seconds = time_alternately(
    {'product': lambda: product(x, x)}, repeats=FEWEST_TURNS
  )
  return 2 * PEAK_SIZE**3 / min(seconds['product'])


def pass_function(
  run: Callable[..., Any], pass_name: str
) -> Callable[..., Any]:
  """Returns the function of the arguments that a pass of `run` computes.

  Cotangents are ones, for every result.
  """

  def forward(arguments):
    return run(**arguments)

  def forward_backward(arguments):
    values, pullback = jax.vjp(lambda a: run(**a), arguments)
    return values, pullback(jax.tree.map(jnp.ones_like, values))

  return {'forward': forward, 'forward_backward': forward_backward}[pass_name]


def _memory_limit() -> int:
  """Returns the bytes of memory of the first device."""
  stats = jax.devices()[0].memory_stats() or {}
  total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return stats.get('bytes_limit', total)


def _prepare(function, arguments, limit: int):
  """Returns (compiled program that has run once, or None; reason or None)."""
  try:
    program = jax.jit(function).lower(arguments).compile()
    memory = program.memory_analysis()
    needed = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
    )
    if needed > limit:
      return None, (
        f'it needs {needed / 2**30:.1f} GiB of memory, the device has '
        f'{limit / 2**30:.1f}'
      )
    jax.block_until_ready(program(arguments))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None, str(error).splitlines()[0]
  return program, None


def measure(
  case: benchmark_cases.Case,
  pass_name: str,
  *,
  implementations: Sequence[str],
  repeats: int,
  memory_limit: int | None = None,
) -> dict[str, Row]:
  """Measures one pass of the implementations on one case.

  Args:
    case: what is called.
    pass_name: one of `PASSES`.
    implementations: names.
    repeats: the most timed calls of each.
    memory_limit: bytes above which nothing is run; None means the device's.

  Returns:
    By implementation: `median_ms` and `min_ms` of `repeats` calls,
    `temp_bytes`, the peak of temporary memory that the compiler reports, and
    `flops_per_s` and `peak_share`, the chunkwise form's operations
    (`benchmark_flops`) over the median time, as they are and as a share of
    `matmul_peak`. Or only `reason`: why it could not run.
  """
  if case.problem:
    return {name: {'reason': case.problem} for name in implementations}
  limit = _memory_limit() if memory_limit is None else memory_limit
  arguments = case.arguments()
  programs, results = {}, {}
  for name in implementations:
    run = functools.partial(case.function, implementation=name)
    function = pass_function(run, pass_name)
    program, reason = _prepare(function, arguments, limit)
    if program is None:
      results[name] = {'reason': reason}
    else:
      programs[name] = program
  seconds = time_alternately(
    {name: functools.partial(p, arguments) for name, p in programs.items()},
    repeats=repeats,
    enough_seconds=_SECONDS_PER_ROW,
  )
  for name, program in programs.items():
    rate = benchmark_flops.flops(case, pass_name)
    rate /= statistics.median(seconds[name])
    results[name] = {
      'median_ms': 1e3 * statistics.median(seconds[name]),
      'min_ms': 1e3 * min(seconds[name]),
      'repeats': len(seconds[name]),
      'temp_bytes': program.memory_analysis().temp_size_in_bytes,
      'flops_per_s': rate,
      'peak_share': rate / matmul_peak(case.dtype),
    }
  return {name: results[name] for name in implementations}


def origin() -> Row:
  """Returns what a row of results says about where it comes from."""
  return {
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'commit': environment.commit(),
    'device': environment.devices(),
    'versions': environment.versions(),
  }


def _ratio(results: Mapping[str, Row], field: str) -> float | None:
  """Returns baseline / chunkwise; None where one of them is missing."""
  above, below = (results.get(n, {}) for n in (BASELINE, CHUNKWISE))
  if field not in above or field not in below:
    return None
  return above[field] / max(below[field], 1e-9)


def rows(suite: benchmark_cases.Suite, *, repeats: int) -> Iterator[Row]:
  """Yields a row per case and pass; ratios are recurrent / xla, or None."""
  for case in suite.cases:
    names = suite.implementations or [
      name
      for name, reason in benchmark_cases.OPS[case.op].explain()
      if reason is None
    ]
    for pass_name in suite.passes:
      results = measure(case, pass_name, implementations=names, repeats=repeats)
      yield {
        'kind': 'kernel',
        'suite': suite.name,
        **suite.settings,
        'op': case.op,
        'variant': case.variant,
        'pass': pass_name,
        'shape': case.shape,
        'flops': benchmark_flops.flops(case, pass_name),
        'matmul_flops_per_s': matmul_peak(case.dtype),
        'results': results,
        'speed_up': _ratio(results, 'median_ms'),
        'temp_ratio': _ratio(results, 'temp_bytes'),
        **origin(),
      }


def growth(found: Iterable[Row]) -> Iterator[Row]:
  """Yields how time and temporary memory of `xla` grow from T to 8 T.

  Rows differ in T alone, within an op and its variant. Times are those of the
  fastest calls, which other load disturbs least.
  """
  curves: dict[tuple[str, str], dict[int, Row]] = {}
  for row in found:
    if 'min_ms' in row['results'][CHUNKWISE]:
      curve = curves.setdefault((row['op'], row['variant']), {})
      curve[row['shape']['T']] = row['results'][CHUNKWISE]
  for (op, variant), curve in curves.items():
    for length in sorted(curve):
      if 8 * length in curve:
        short, long = curve[length], curve[8 * length]
        yield {
          'op': op,
          'variant': variant,
          'T': length,
          'time': long['min_ms'] / short['min_ms'],
          'memory': long['temp_bytes'] / short['temp_bytes'],
        }


def format_growth(found: Row) -> str:
  """Returns a line of `growth`, held against its limit."""
  most = max(found['time'], found['memory'])
  verdict = 'within' if most <= MOST_GROWTH else 'ABOVE'
  return (
    f'{found["op"]} {found["variant"]}, T = {found["T"]}: time(8T)/time(T) '
    f'{found["time"]:.2f}, memory {found["memory"]:.2f}, {verdict} '
    f'{MOST_GROWTH}'
  )


def _line(values: Iterable[str]) -> str:
  return ''.join(
    f'{value:{width}}'
    for value, (_, width) in zip(values, _COLUMNS, strict=True)
  )


def header() -> str:
  """Returns the heading of the table."""
  return _line(name for name, _ in _COLUMNS)


def format_row(row: Row) -> Iterator[str]:
  """Yields a line under `header` per implementation."""
  start = (row['op'], row['variant'], row['shape']['name'], row['pass'])
  for name, result in row['results'].items():
    if 'reason' in result:
      yield _line((*start, name, *[''] * 6)).rstrip() + f'  {result["reason"]}'
      continue
    speed_up = row['speed_up'] if name == CHUNKWISE else None
    yield _line(
      (
        *start,
        name,
        f'{result["median_ms"]:.1f}',
        f'{result["min_ms"]:.1f}',
        f'{result["temp_bytes"] / 2**20:.1f}',
        f'{result["flops_per_s"] / 1e9:.1f}',
        f'{result["peak_share"]:.1%}',
        '' if speed_up is None else f'{speed_up:.1f}',
      )
    )


def to_lines(found: Iterable[Row]) -> str:
  """Returns rows as JSONL."""
  return ''.join(json.dumps(row) + '\n' for row in found)
