"""Compiles the passes of an op that are timed, and says what does not fit.

A call writes its results where those of the call before were, as a training
step writes its state: what is timed is the op, not what the system does to have
fresh memory for results that are thrown away. Cotangents are ones, made before.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
import dataclasses
import functools
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp

from experiments import benchmark_cases

PASSES = ('forward', 'forward_backward', 'backward')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A compiled pass.

  Attributes:
    compiled: what is timed, of the last results, which it overwrites, and the
      arguments.
    results: shapes and dtypes of the results.
    prepare: makes of the arguments of the op those of the pass.
  """

  compiled: jax.stages.Compiled
  results: Any
  prepare: Callable[[Mapping[str, jax.Array]], Any]

  @property
  def temp_bytes(self) -> int:
    """Temporary memory as the compiler reports it."""
    return self.compiled.memory_analysis().temp_size_in_bytes

  @property
  def needed_bytes(self) -> int:
    """Memory for arguments, results and what is temporary."""
    memory = self.compiled.memory_analysis()
    return (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes
    )

  def bind(self, arguments: Mapping[str, jax.Array]) -> Callable[[], Any]:
    """Returns a call of the pass for the arguments of the op.

    Its results are there until it is called again.
    """
    taken = jax.block_until_ready(self.prepare(arguments))
    last = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.results)

    def call():
      nonlocal last
      last = self.compiled(last, taken)
      return last

    return call


def pass_function(
  run: Callable[..., Any], pass_name: str
) -> Callable[..., Any]:
  """Returns the function that a pass of `run` computes.

  It takes what `given` returns. For `backward` see `backward_functions`.
  """

  def forward(arguments):
    return run(**arguments)

  def forward_backward(both):
    arguments, cotangents = both
    values, pullback = jax.vjp(lambda a: run(**a), arguments)
    return values, pullback(cotangents)

  return {'forward': forward, 'forward_backward': forward_backward}[pass_name]


def _ones(shapes: Any) -> Any:
  return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def given(
  run: Callable[..., Any], pass_name: str, arguments: Mapping[str, jax.Array]
) -> Any:
  """Returns the arguments of a pass of `run`: those of `run`, by name.

  For `forward_backward` it is a pair of them and of ones for every result.
  """
  if pass_name == 'forward':
    return arguments
  values = jax.eval_shape(lambda a: run(**a), arguments)
  return arguments, _ones(values)


def backward_functions(
  run: Callable[..., Any],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """Returns (arguments -> residuals, residuals -> gradients).

  The residuals go from one compiled program into the other as a list of
  arrays; the second can be traced only after the first.
  """
  structure = None

  def residuals(arguments):
    nonlocal structure
    values, pullback = jax.vjp(lambda a: run(**a), arguments)
    leaves, structure = jax.tree.flatten(pullback)
    return leaves, _ones(values)

  def backward(taken):
    leaves, cotangents = taken
    return jax.tree.unflatten(structure, leaves)(cotangents)

  return residuals, backward


def memory_limit() -> int:
  """Returns the bytes of memory of the first device."""
  stats = jax.devices()[0].memory_stats() or {}
  total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  return stats.get('bytes_limit', total)


def exhausted(error: jax.errors.JaxRuntimeError) -> str:
  """Returns the reason if memory was short, and raises all else."""
  if 'RESOURCE_EXHAUSTED' not in str(error):
    raise error
  return str(error).splitlines()[0]


def too_large(needed: int, limit: int) -> str | None:
  """Returns why so many bytes cannot be had, or None."""
  if needed <= limit:
    return None
  return (
    f'it needs {needed / 2**30:.1f} GiB of memory, the device has '
    f'{limit / 2**30:.1f}'
  )


def _program(function, arguments, prepare) -> Program:
  def call(last, taken):
    del last
    return function(taken)

  results = jax.eval_shape(function, arguments)
  overwriting = jax.jit(call, donate_argnums=0, keep_unused=True)
  return Program(
    compiled=overwriting.lower(results, arguments).compile(),
    results=results,
    prepare=prepare,
  )


def compile_pass(
  run: Callable[..., Any], pass_name: str, arguments: Mapping[str, jax.Array]
) -> Program:
  """Returns the program of a pass of `run`, see `pass_function`."""
  if pass_name == 'backward':
    residuals, backward = backward_functions(run)
    before = jax.jit(residuals).lower(arguments)
    return _program(backward, before.out_info, before.compile())
  prepare = functools.partial(given, run, pass_name)
  shapes = jax.eval_shape(prepare, arguments)
  return _program(pass_function(run, pass_name), shapes, prepare)


def _compile(run, pass_name: str, arguments) -> Program | str:
  """Returns the program, or why there is none."""
  try:
    return compile_pass(run, pass_name, arguments)
  except NotImplementedError as error:
    return str(error)
  except jax.errors.JaxRuntimeError as error:
    return exhausted(error)


def compile_all(
  case: benchmark_cases.Case,
  passes: Iterable[str],
  implementations: Iterable[str],
  arguments: Mapping[str, jax.Array],
) -> dict[tuple[str, str], Program | str]:
  """Returns the programs by pass and implementation, compiled side by side.

  In place of a program that there is no memory for, or that an implementation
  does not cover, stands the reason.
  """
  keys = list(itertools.product(passes, implementations))

  def compiled(key):
    pass_name, implementation = key
    run = functools.partial(
      case.function, implementation=implementation, **case.options
    )
    return _compile(run, pass_name, arguments)

  with futures.ThreadPoolExecutor() as pool:
    return dict(zip(keys, pool.map(compiled, keys), strict=True))


def first_run(
  program: Program, arguments: Mapping[str, jax.Array], limit: int
) -> Callable[[], Any] | str:
  """Returns a call of a program that has been made once, or why it cannot be.

  Args:
    program: what is called.
    arguments: of the op.
    limit: bytes of memory above which nothing is run.
  """
  reason = too_large(program.needed_bytes, limit)
  if reason:
    return reason
  try:
    call = program.bind(arguments)
    jax.block_until_ready(call())
  except jax.errors.JaxRuntimeError as error:
    return exhausted(error)
  return call
