"""Times calls that take turns, and the peaks that rates are held against."""

from collections.abc import Callable, Mapping
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

FEWEST_TURNS = 5
SLOW_TURNS = 3
SETTLING_CALLS = 2
PEAK_SIZE = 2048
COPY_SIZE = 1 << 28

_GPU_PEAK_SIZE = 8192


def time_alternately(
  functions: Mapping[str, Callable[[], Any]],
  *,
  repeats: int,
  enough_seconds: float = math.inf,
  slow_seconds: float = math.inf,
) -> dict[str, list[float]]:
  """Returns the seconds of each call, the functions taking turns.

  Taking turns, all of them meet the same state of the machine. In each turn
  `SETTLING_CALLS` calls that are not counted come first: the caches and the
  pages of memory are then its own and not those of the function before. One is
  not enough after a function that takes much memory.

  Args:
    functions: what is called, by name.
    repeats: the most turns.
    enough_seconds: once these have passed, turns end after the fifth.
    slow_seconds: a function that once took longer takes no more than three
      turns, and is not called beforehand any more.

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
      is_slow = max(seconds[name], default=0.0) > slow_seconds
      if is_slow and turn >= SLOW_TURNS:
        continue
      if not is_slow:
        for _ in range(SETTLING_CALLS):
          jax.block_until_ready(function())
      start = time.perf_counter()
      jax.block_until_ready(function())
      seconds[name].append(time.perf_counter() - start)
  return seconds


def call_often(function: Callable[[], Any], calls: int) -> Any:
  """Starts so many calls and returns the last result.

  Where work is asynchronous, the device is then never idle between calls.
  """
  for _ in range(calls):
    result = function()
  return result


def calls_within(function: Callable[[], Any], seconds: float) -> int:
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
  run = functools.partial(call_often, lambda: product(x, x), calls)
  seconds = time_alternately({'product': run}, repeats=FEWEST_TURNS)
  return 2 * size**3 * calls / min(seconds['product'])


@functools.cache
def copy_peak() -> float:
  """Returns the bytes/s read and written of the fastest of 5 device copies."""
  x = jax.random.bits(jax.random.key(0), (COPY_SIZE,), jnp.uint32)
  run = functools.partial(call_often, lambda: jnp.copy(x), 10)
  seconds = time_alternately({'copy': run}, repeats=FEWEST_TURNS)
  return 10 * 2 * x.nbytes / min(seconds['copy'])
