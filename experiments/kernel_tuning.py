"""Measures candidates for the block sizes of the delta rule's Hopper kernels.

A candidate's cost at K and V is the sum of its times, forward and backward, at
`SIZES`, each over that of the fastest candidate: few rows count like many. The
candidates of a size are compiled side by side and timed taking turns; what a
file already has is not measured again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
import functools
import itertools
import math
import os
import pathlib
import statistics
from typing import Any

import jax

from experiments import atomic_file
from experiments import benchmark_cases
from experiments import benchmark_programs
from experiments import benchmark_timing
from experiments import benchmarking
from experiments import environment
from experiments import result_rows
from pallas_kernels.delta_rule import mosaic_gpu
from pallas_kernels.delta_rule import mosaic_gpu_config

Row = dict[str, Any]

MEASURED = pathlib.Path('results/tuning.jsonl')

# B, T, H: rows for less than half of the processors, and for more than all.
SIZES = ((2, 8192, 16), (4, 4096, 64))
# Calls are queued for about that long, and candidates take turns for so long.
_QUEUE_SECONDS = 0.03
_ROW_SECONDS = 3.0


def _program(case, config, arguments) -> Callable[[], Any] | None:
  """Returns a call of the candidate once made, None if it does not fit."""
  run = functools.partial(
    mosaic_gpu.delta_rule, scale=case.K**-0.5, config=config
  )
  try:
    program = benchmark_programs.compile_pass(
      run, 'forward_backward', arguments
    )
  except ValueError as error:
    if 'shared memory' not in str(error):
      raise
    return None
  call = program.bind(arguments)
  # The first call takes the time to load the program.
  jax.block_until_ready(call())
  return call


def _seconds(case, configs, arguments, repeats: int) -> list[float | None]:
  """Returns median times of both passes, None for what does not fit."""
  compiled = functools.partial(_program, case, arguments=arguments)
  with futures.ThreadPoolExecutor() as pool:
    programs = list(pool.map(compiled, configs))
  runs = {
    str(i): functools.partial(benchmark_timing.call_often, program)
    for i, program in enumerate(programs)
    if program
  }
  effort = benchmarking.Effort(
    repeats=repeats, queue_seconds=_QUEUE_SECONDS, row_seconds=_ROW_SECONDS
  )
  medians = {
    name: statistics.median(seconds)
    for name, (seconds, _) in benchmarking.times(runs, effort).items()
  }
  return [medians.get(str(i)) for i in range(len(programs))]


def _arguments(case: benchmark_cases.Case) -> Mapping[str, jax.Array]:
  state = jax.numpy.zeros((case.B, case.H, case.K, case.V))
  return dict(case.arguments()) | {'initial_state': state}


def _rows_of(case, known: Sequence[Row], repeats: int) -> Iterator[Row]:
  """Yields a row per candidate, the known ones as they are."""
  rows = []
  for config in mosaic_gpu_config.candidates():
    tuned = {n: getattr(config, n) for n in mosaic_gpu_config.TUNED}
    key = {'kind': 'tuning', 'shape': case.shape, **tuned}
    row = next((r for r in known if key.items() <= r.items()), key)
    rows.append((config, row))
  new = [config for config, row in rows if 'seconds' not in row]
  seconds = iter(_seconds(case, new, _arguments(case), repeats) if new else ())
  for _, row in rows:
    if 'seconds' not in row:
      row = row | {'seconds': next(seconds), **result_rows.origin()}
    yield row


def rows(
  *,
  head_dims: Sequence[int] = mosaic_gpu_config.HEAD_DIMS,
  sizes: Sequence[tuple[int, int, int]] = SIZES,
  known: Sequence[Row] = (),
  repeats: int,
) -> Iterator[Row]:
  """Yields the times of every candidate: `config`, `sizes`, `seconds`.

  Rows that are `known` are yielded as they are.
  """
  for dims in itertools.product(head_dims, repeat=2):
    for batch, length, heads in sizes:
      case = benchmark_cases.Case(
        op='delta_rule',
        name=f'b{batch}_t{length}_h{heads}_d{dims[0]}_{dims[1]}',
        **{'B': batch, 'T': length, 'H': heads, 'K': dims[0], 'V': dims[1]},
        dtype=mosaic_gpu_config.DTYPE,
      )
      yield from _rows_of(case, known, repeats)


def _fastest(found: Sequence[Row]) -> dict[str, float]:
  """Returns the least seconds at every size, by its name."""
  fastest: dict[str, float] = {}
  for row in found:
    name = row['shape']['name']
    seconds = row['seconds'] or math.inf
    fastest[name] = min(seconds, fastest.get(name, math.inf))
  return fastest


def _cost(found: Sequence[Row], config, fastest) -> float:
  """Returns the cost of a candidate; without end if it did not run."""
  times = {
    row['shape']['name']: row['seconds'] or math.inf
    for row in found
    if all(row[n] == getattr(config, n) for n in mosaic_gpu_config.TUNED)
  }
  return sum(times.get(name, math.inf) / t for name, t in fastest.items())


def best(found: Sequence[Row], device: str) -> list[Row]:
  """Returns the rows of the table for a kind of device.

  Raises:
    ValueError: no candidate ran at all sizes of some K and V.
  """
  by_dims: dict[tuple[int, int], list[Row]] = {}
  for row in found:
    dims = row['shape']['K'], row['shape']['V']
    by_dims.setdefault(dims, []).append(row)
  table = []
  for dims, here in by_dims.items():
    fastest = _fastest(here)
    costs = {
      config: _cost(here, config, fastest)
      for config in mosaic_gpu_config.candidates()
    }
    chosen = min(costs, key=lambda c: costs[c])
    if not 0 < costs[chosen] < math.inf:
      raise ValueError(
        f'one candidate must run at all sizes, none did at K, V = {dims}'
      )
    table.append(mosaic_gpu_config.row(device, *dims, chosen))
  return table


def tune(path: str | os.PathLike | None, repeats: int) -> Iterator[Row]:
  """Yields the rows of all candidates, then writes the table.

  Args:
    path: JSONL, which gets every row once it is measured; rows of this kind of
      device and commit that it has are taken from it, those of other commits
      go. None means `MEASURED`.
    repeats: most timed calls of each.

  Raises:
    NotImplementedError: this machine cannot run the kernels.
  """
  reason = mosaic_gpu.unavailable()
  if reason:
    raise NotImplementedError(f'the kernels cannot be measured: {reason}')
  path = path or MEASURED
  here, commit = environment.devices(), environment.commit()
  stored = [
    row
    for row in result_rows.read(path)
    if row['device'] != here or row['commit'] == commit
  ]
  known = [row for row in stored if row['device'] == here]
  found = []
  for row in rows(known=known, repeats=repeats):
    if row not in known:
      stored.append(row)
      result_rows.write(path, stored)
    found.append(row)
    yield row
  table = best(found, jax.devices()[0].device_kind)
  atomic_file.replace(mosaic_gpu_config.TABLE, mosaic_gpu_config.merged(table))


def format_row(row: Row) -> str:
  """Returns a row as a line."""
  seconds = row['seconds']
  time = 'does not fit' if seconds is None else f'{1e3 * seconds:.3f} ms'
  return (
    f'{row["shape"]["name"]}: stages {row["stages"]}, inverse_groups '
    f'{row["inverse_groups"]}: {time}'
  )
