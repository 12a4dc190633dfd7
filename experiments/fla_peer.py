"""Calls the Triton kernels of flash-linear-attention on a benchmark's case.

They are PyTorch's and run in this process, on the same GPU and numbers. JAX
takes three quarters of the GPU's memory when it starts; the environment
variable XLA_PYTHON_CLIENT_PREALLOCATE=false leaves the rest to PyTorch.
"""

from collections.abc import Callable, Mapping
import importlib
from typing import Any

import numpy as np

from experiments import benchmark_cases

NAME = 'fla'
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
  backward = pass_name == 'forward_backward'
  tensors = {
    name: torch.tensor(
      np.asarray(x, np.float32),
      dtype=torch.float32 if name == 'g' else getattr(torch, case.dtype),
      device='cuda',
      requires_grad=backward,
    )
    for name, x in arguments.items()
  }
  cotangents = None

  def once():
    nonlocal cotangents
    values = op(**tensors, output_final_state=True)
    if backward:
      cotangents = cotangents or [torch.ones_like(x) for x in values]
      torch.autograd.grad(values, list(tensors.values()), cotangents)

  def run(calls: int) -> None:
    for _ in range(calls):
      once()
    torch.cuda.synchronize()

  try:
    run(1)
  except torch.OutOfMemoryError as error:
    return None, str(error).splitlines()[0]
  return run, None
