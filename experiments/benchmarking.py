"""Times implementations of the ops against one another in one run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
import datetime
import functools
import itertools
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
from experiments import fla_peer
from experiments import kernel_checks

PASSES = ('forward', 'forward_backward')
CHUNKWISE = 'xla'
BASELINE = 'recurrent'
HOPPER = 'mosaic_gpu'
FEWEST_TURNS = 5
PEAK_SIZE = 2048
COPY_SIZE = 1 << 28

Row = dict[str, Any]

_GPU_PEAK_SIZE = 8192

# A row's calls are repeated until this long has passed, and 5 times at least.
_SECONDS_PER_ROW = 5.0


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


def queued(function: Callable[[], Any], calls: int) -> Callable[[], Any]:
  """Returns a function that starts so many calls and returns the last result.

  Where work is asynchronous, the device is then never idle between calls.
  """

  def run():
    for _ in range(calls):
      result = function()
    return result

  return run


def _calls_within(function: Callable[[], Any], seconds: float) -> int:
  """Returns how many calls take that long, at least 1 and at most 100."""
  start = time.perf_counter()
  jax.block_until_ready(function())
  return min(100, max(1, round(seconds / (time.perf_counter() - start))))


@functools.cache
def matmul_peak(dtype: str) -> float:
  """Returns the FLOP/s of the fastest of 5 products of square matrices."""
  on_cpu = jax.default_backend() == 'cpu'
  size, calls = (PEAK_SIZE, 1) if on_cpu else (_GPU_PEAK_SIZE, 20)
  # Zeros and ones draw less power, and a GPU then runs faster than on data.
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
  product = jax.jit(functools.partial(jnp.dot, precision='highest'))
  run = queued(lambda: product(x, x), calls)
  seconds = time_alternately({'product': run}, repeats=FEWEST_TURNS)
  return 2 * size**3 * calls / min(seconds['product'])


@functools.cache
def copy_peak() -> float:
  """Returns the bytes/s read and written of the fastest of 5 device copies."""
  x = jax.random.bits(jax.random.key(0), (COPY_SIZE,), jnp.uint32)
  run = queued(lambda: jnp.copy(x), 10)
  seconds = time_alternately({'copy': run}, repeats=FEWEST_TURNS)
  return 10 * 2 * x.nbytes / min(seconds['copy'])


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


def _compile(function, arguments) -> jax.stages.Compiled | str:
  """Returns the program, or why there is none."""
  try:
    return jax.jit(function).lower(arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    return _exhausted(error)


def _exhausted(error: jax.errors.JaxRuntimeError) -> str:
  """Returns the reason if memory was short, and raises all else."""
  if 'RESOURCE_EXHAUSTED' not in str(error):
    raise error
  return str(error).splitlines()[0]


def compile_all(
  case: benchmark_cases.Case,
  passes: Iterable[str],
  implementations: Iterable[str],
  arguments: Mapping[str, jax.Array],
) -> dict[tuple[str, str], jax.stages.Compiled | str]:
  """Returns the programs by pass and implementation, compiled side by side.

  In place of a program that there is no memory for stands the reason.
  """
  keys = list(itertools.product(passes, implementations))
  functions = [
    pass_function(functools.partial(case.function, implementation=n), p)
    for p, n in keys
  ]
  with futures.ThreadPoolExecutor() as pool:
    found = pool.map(lambda f: _compile(f, arguments), functions)
    return dict(zip(keys, found, strict=True))


def _first_run(program, arguments, limit: int) -> str | None:
  """Runs a program once; returns why it cannot be run, or None."""
  memory = program.memory_analysis()
  needed = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
  )
  if needed > limit:
    return (
      f'it needs {needed / 2**30:.1f} GiB of memory, the device has '
      f'{limit / 2**30:.1f}'
    )
  try:
    jax.block_until_ready(program(arguments))
  except jax.errors.JaxRuntimeError as error:
    return _exhausted(error)
  return None


def _result(case, pass_name: str, arguments, seconds: Sequence[float]) -> Row:
  """Returns times and rates of the calls of one implementation."""
  median = statistics.median(seconds)
  rate = benchmark_flops.flops(case, pass_name) / median
  values = jax.eval_shape(
    pass_function(case.function, 'forward'), dict(arguments)
  )
  moved = benchmark_flops.compulsory_bytes(arguments, values, pass_name)
  return {
    'median_ms': 1e3 * median,
    'min_ms': 1e3 * min(seconds),
    'repeats': len(seconds),
    'flops_per_s': rate,
    'peak_share': rate / matmul_peak(case.dtype),
    'bytes_per_s': moved / median,
  }


def measure_fla(
  case: benchmark_cases.Case,
  pass_name: str,
  *,
  repeats: int,
  queue_seconds: float,
  arguments: Mapping[str, jax.Array],
) -> Row:
  """Measures flash-linear-attention's kernels as `measure` does the op's."""
  run, reason = fla_peer.prepare(case, pass_name, arguments)
  if run is None:
    return {'reason': reason}
  calls = _calls_within(functools.partial(run, 1), queue_seconds)
  seconds = time_alternately(
    {fla_peer.NAME: functools.partial(run, calls)},
    repeats=repeats,
    enough_seconds=_SECONDS_PER_ROW,
  )
  seconds = [s / calls for s in seconds[fla_peer.NAME]]
  return _result(case, pass_name, arguments, seconds) | {'queued': calls}


def measure(
  case: benchmark_cases.Case,
  pass_name: str,
  *,
  implementations: Sequence[str],
  repeats: int,
  memory_limit: int | None = None,
  queue_seconds: float = 0.0,
  arguments: Mapping[str, jax.Array] | None = None,
  programs: Mapping[tuple[str, str], Any] | None = None,
) -> dict[str, Row]:
  """Measures one pass of the implementations on one case.

  Args:
    case: what is called.
    pass_name: one of `PASSES`.
    implementations: names.
    repeats: the most timed calls of each.
    memory_limit: bytes above which nothing is run; None means the device's.
    queue_seconds: calls are queued for about that long and timed together.
    arguments: of the case; None means that they are made.
    programs: what `compile_all` returned; None means that it is called.

  Returns:
    By implementation: `median_ms` and `min_ms` of `repeats` times of `queued`
    calls, `temp_bytes` as the compiler reports it, and over the median time
    `flops_per_s` (`benchmark_flops`), `peak_share` of `matmul_peak` and the
    compulsory `bytes_per_s`. Or only `reason`: why it could not run.
  """
  if case.problem:
    return {name: {'reason': case.problem} for name in implementations}
  limit = _memory_limit() if memory_limit is None else memory_limit
  arguments = case.arguments() if arguments is None else arguments
  if programs is None:
    programs = compile_all(case, (pass_name,), implementations, arguments)
  runs, results = {}, {}
  for name in implementations:
    program = programs[pass_name, name]
    is_program = not isinstance(program, str)
    reason = _first_run(program, arguments, limit) if is_program else program
    if reason:
      results[name] = {'reason': reason}
    else:
      runs[name] = functools.partial(program, arguments)
  calls = {n: _calls_within(run, queue_seconds) for n, run in runs.items()}
  seconds = time_alternately(
    {name: queued(run, calls[name]) for name, run in runs.items()},
    repeats=repeats,
    enough_seconds=_SECONDS_PER_ROW,
  )
  for name, count in calls.items():
    memory = programs[pass_name, name].memory_analysis()
    results[name] = _result(
      case, pass_name, arguments, [s / count for s in seconds[name]]
    ) | {'queued': count, 'temp_bytes': memory.temp_size_in_bytes}
  return {name: results[name] for name in implementations}


def origin() -> Row:
  """Returns what a row of results says about where it comes from."""
  return {
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'commit': environment.commit(),
    'device': environment.devices(),
    'versions': environment.versions(),
  }


def _ratio(results: Mapping[str, Row], names, field: str) -> float | None:
  """Returns baseline / the implementation; None where one is missing."""
  above, below = (results.get(n, {}) for n in names)
  if field not in above or field not in below:
    return None
  return above[field] / max(below[field], 1e-9)


def _compared(suite: benchmark_cases.Suite) -> tuple[str, str]:
  """Returns the implementations of the ratios: baseline / the other."""
  return (CHUNKWISE, HOPPER) if suite.checked else (BASELINE, CHUNKWISE)


def check_rows(suite: benchmark_cases.Suite) -> Iterator[Row]:
  """Yields a row per check of a suite's first implementation.

  Raises:
    kernel_checks.WrongResultError: after the row of a result that is wrong.
  """
  for case in suite.checked:
    for cosine in (0.0, 0.9):
      check = kernel_checks.Check(
        case=case,
        implementation=suite.implementations[0],
        cosine=cosine,
        with_segments=case.gate != 'none',  # Without, kernels know no decay.
      )
      row = kernel_checks.row(check)
      yield {'suite': suite.name} | row | origin()
      kernel_checks.require_right(row)


def _results(suite, case, pass_name: str, names, late: bool, **options):
  """Returns results by implementation, those of FLA among them if checked."""
  options['queue_seconds'] = suite.queue_seconds
  left_out = names[1:] if late else []
  results = measure(
    case,
    pass_name,
    implementations=[n for n in names if n not in left_out],
    **options,
  )
  reason = f'left out: {suite.enough_seconds:.0f} s had passed'
  results |= {name: {'reason': reason} for name in left_out}
  if suite.checked:
    del options['programs']
    results[fla_peer.NAME] = (
      {'reason': reason} if late else measure_fla(case, pass_name, **options)
    )
  return results


def rows(suite: benchmark_cases.Suite, *, repeats: int) -> Iterator[Row]:
  """Yields the checks, then a row per case and pass; ratios can be None."""
  begin = time.perf_counter()
  yield from check_rows(suite)
  compared = _compared(suite)
  for case in suite.cases:
    names = suite.implementations or [
      name
      for name, reason in benchmark_cases.OPS[case.op].explain()
      if reason is None
    ]
    arguments = programs = None
    if not case.problem:
      arguments = case.arguments()
      programs = compile_all(case, suite.passes, names, arguments)
    options = {'arguments': arguments, 'programs': programs}
    for pass_name in suite.passes:
      late = time.perf_counter() - begin > suite.enough_seconds
      results = _results(
        suite, case, pass_name, list(names), late, repeats=repeats, **options
      )
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
        'copy_bytes_per_s': copy_peak() if suite.checked else None,
        'results': results,
        'speed_up': _ratio(results, compared, 'median_ms'),
        'temp_ratio': _ratio(results, compared, 'temp_bytes'),
        **origin(),
      }


def to_lines(found: Iterable[Row]) -> str:
  """Returns rows as JSONL."""
  return ''.join(json.dumps(row) + '\n' for row in found)
