"""Calls the Triton kernels of flash-linear-attention on a benchmark's case.

They are PyTorch's and run in this process, on the same GPU and numbers. JAX
takes three quarters of the GPU's memory when it starts; the environment
variable XLA_PYTHON_CLIENT_PREALLOCATE=false leaves the rest to PyTorch.
"""

from collections.abc import Callable, Mapping
import functools
import importlib
from typing import Any

import numpy as np

from experiments import benchmark_cases

NAME = 'fla'
# What its ops raise for a call that they do not take, such as the gated
# backward pass on Hopper with some versions of Triton.
_REFUSALS = (RuntimeError, ValueError, NotImplementedError, AssertionError)
# A gate's module below fla.ops, and its function.
_FUNCTIONS = {
  'none': ('delta_rule', 'chunk_delta_rule'),
  'head': ('gated_delta_rule', 'chunk_gated_delta_rule'),
}


def _load(gate: str) -> tuple[Any, Callable[..., Any]]:
  module, function = _FUNCTIONS[gate]
  torch = importlib.import_module('torch')
  ops = importlib.import_module(f'fla.ops.{module}')
  if not torch.cuda.is_available():
    raise ImportError('PyTorch sees no GPU')
  return torch, getattr(ops, function)


def prepare(
  case: benchmark_cases.Case, pass_name: str, arguments: Mapping[str, Any]
) -> tuple[Callable[[int], None] | None, str | None]:
  """Returns (the timed function, None), or (None, why there is none).

  The function takes a number of calls, queues them and waits for the last.
  """
  if case.op != 'delta_rule' or case.gate not in _FUNCTIONS:
    return None, f'no {case.op} with g per {case.gate} was looked for'
  try:
    torch, op = _load(case.gate)
  except ImportError as error:
    return None, f'{error}; pip install torch flash-linear-attention'
  tensors = {
    name: torch.tensor(
      np.asarray(x.astype(np.float32)),
      dtype=torch.float32 if name == 'g' else getattr(torch, case.dtype),
      device='cuda',
      requires_grad=pass_name != 'forward',
    )
    for name, x in arguments.items()
  }
  if case.normalize_qk:
    op = functools.partial(op, use_qk_l2norm_in_kernel=True)
  once = _pass_function(torch, op, tensors, pass_name)

  def run(calls: int) -> None:
    for _ in range(calls):
      once()
    torch.cuda.synchronize()

  try:
    run(1)
  except (torch.OutOfMemoryError, *_REFUSALS) as error:
    message = (str(error).strip() or repr(error)).splitlines()[0]
    return None, f'{type(error).__name__}: {message}'
  return run, None


def _pass_function(torch, op, tensors, pass_name: str) -> Callable[[], None]:
  """Returns the call that is timed; cotangents are ones."""
  forward = functools.partial(op, **tensors, output_final_state=True)
  values, cotangents = (), []

  def once():
    nonlocal values, cotangents
    if pass_name != 'backward' or not values:
      values = forward()
    if pass_name == 'forward':
      return
    cotangents = cotangents or [torch.ones_like(x) for x in values]
    torch.autograd.grad(
      values,
      list(tensors.values()),
      cotangents,
      retain_graph=pass_name == 'backward',
    )

  return once
