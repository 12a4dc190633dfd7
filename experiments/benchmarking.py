"""Times implementations of the delta rule against one another in one run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import datetime
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments import environment
from pallas_kernels import delta_rule
from pallas_kernels.delta_rule import arg_specs

SUITES = {'cpu': arg_specs.with_tag('cpu')}
PASSES = ('forward', 'forward_backward')
BASELINE = 'recurrent'

Row = dict[str, Any]

_HEADER = (
  f'{"shape":<10}{"pass":<18}{"xla ms":>10}{"recurrent ms":>14}'
  f'{"speed-up":>10}{"xla MiB":>10}{"recurrent MiB":>15}'
)


def _pass_function(name: str, implementation: str) -> Callable[..., Any]:
  """Returns the function of (arguments, cotangents) that a pass computes."""
  run = functools.partial(delta_rule, implementation=implementation)

  def forward(arguments, cotangents):
    del cotangents
    return run(**arguments)

  def forward_backward(arguments, cotangents):
    values, pullback = jax.vjp(lambda a: run(**a), arguments)
    return values, pullback(cotangents)

  return {'forward': forward, 'forward_backward': forward_backward}[name]


def time_alternately(
  functions: Mapping[str, Callable[[], Any]], *, repeats: int
) -> dict[str, list[float]]:
  """Returns the seconds of each call, the functions taking turns.

  Taking turns, all of them meet the same state of the machine. In each turn a
  call that is not counted comes first: the caches and the pages of memory are
  then its own and not those of the function before.

  Raises:
    ValueError: `repeats` is below 1.
  """
  if repeats < 1:
    raise ValueError(f'repeats must be at least 1, got {repeats}')
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      jax.block_until_ready(function())
      start = time.perf_counter()
      jax.block_until_ready(function())
      seconds[name].append(time.perf_counter() - start)
  return seconds


def measure(
  spec: arg_specs.ArgSpec,
  pass_name: str,
  *,
  implementations: Sequence[str] = ('xla', BASELINE),
  repeats: int,
) -> dict[str, dict[str, float]]:
  """Measures one pass of the implementations on one shape.

  Returns:
    By implementation: `median_ms` and `min_ms` of a call, and `temp_bytes`,
    the peak of temporary memory that the compiler reports.
  """
  arguments = arg_specs.random_arguments(spec)
  cotangents = (
    jnp.ones_like(arguments['v']),
    jnp.ones((spec.B, spec.HV, spec.K, spec.V), jnp.float32),
  )
  compiled = {
    name: jax.jit(_pass_function(pass_name, name))
    .lower(arguments, cotangents)
    .compile()
    for name in implementations
  }
  seconds = time_alternately(
    {
      name: functools.partial(program, arguments, cotangents)
      for name, program in compiled.items()
    },
    repeats=repeats,
  )
  return {
    name: {
      'median_ms': 1e3 * statistics.median(seconds[name]),
      'min_ms': 1e3 * min(seconds[name]),
      'temp_bytes': program.memory_analysis().temp_size_in_bytes,
    }
    for name, program in compiled.items()
  }


def origin() -> Row:
  """Returns what a row of results says about where it comes from."""
  return {
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'commit': environment.commit(),
    'device': environment.devices(),
    'versions': environment.versions(),
  }


def rows(specs: Iterable[arg_specs.ArgSpec], *, repeats: int) -> Iterable[Row]:
  """Yields a row per shape and pass; ratios are recurrent / xla."""
  for spec in specs:
    for pass_name in PASSES:
      results = measure(spec, pass_name, repeats=repeats)
      xla, baseline = results['xla'], results[BASELINE]
      yield {
        'kind': 'kernel',
        'op': 'delta_rule',
        'pass': pass_name,
        'shape': {
          'name': spec.name,
          'dtype': spec.dtype,
          **{axis: getattr(spec, axis) for axis in 'B T H HV K V'.split()},
        },
        'repeats': repeats,
        'results': results,
        'speed_up': baseline['median_ms'] / xla['median_ms'],
        'temp_ratio': baseline['temp_bytes'] / max(1, xla['temp_bytes']),
        **origin(),
      }


def format_row(row: Row) -> str:
  """Returns a row as a line under `header`."""
  xla, baseline = row['results']['xla'], row['results'][BASELINE]
  return (
    f'{row["shape"]["name"]:<10}{row["pass"]:<18}{xla["median_ms"]:>10.1f}'
    f'{baseline["median_ms"]:>14.1f}{row["speed_up"]:>10.1f}'
    f'{xla["temp_bytes"] / 2**20:>10.1f}'
    f'{baseline["temp_bytes"] / 2**20:>15.1f}'
  )


def header() -> str:
  """Returns the heading of the table."""
  return _HEADER


def to_lines(found: Iterable[Row]) -> str:
  """Returns rows as JSONL."""
  return ''.join(json.dumps(row) + '\n' for row in found)
