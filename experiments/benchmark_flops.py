"""Counts the arithmetic of the ops' chunkwise forms, and the fewest bytes.

With K and V the dimensions of keys and values and C the tokens of a chunk, the
matrix products of a chunkwise form are of three kinds. Per row and token they
take 2 K V (between state and rows), 2 C K (scores) or 2 C V (scores times
values) floating-point operations, and a row of the triangular inverse about
C^2 / 3. Where values are grouped, each of their heads counts in full. The forms
and their gradients are in the docstrings of `chunked_xla*`; products per row of
them:

    delta rule       per key    forward    K_in S, K_out^T X | G | (I + G b)^-1
                                backward   K_out dS', dK_in, dK_out, K_in^T dV |
                                           G, dK of G | dV, dG
                     per query  forward    Q_in S | P | P X
                                backward   dQ_in, Q_in^T dO | P, dQ and dK of P
                                           | dX, dP
    linear attention per token  forward    Q_in S, K_out^T V | P | P V
                                backward   dQ_in, Q_in^T dO, dK_out, K_out dS' |
                                           P, dQ and dK of P | dV, dP

A diagonal plus low rank takes the scores and products of two keys, k and a, and
of two queries, q and b. Products with triangular matrices count in full;
decays, resets and all that is done element by element do not count.

C is 32 whatever chunk an implementation takes, and all are measured by the same
count: the scan over tokens, longer chunks, which do more for the same, and
backward passes that find states again which they could have kept.
"""

import math
from typing import Any, NamedTuple

import jax

from experiments import benchmark_cases

# Tokens of a chunk; keys, for delta_product.
CHUNK = 32


class _Products(NamedTuple):
  """How many products of each kind."""

  kv: int
  ck: int
  cv: int


# op: pass: (per key, per query)
_DELTA = {
  'forward': (_Products(2, 1, 1), _Products(1, 1, 1)),
  'backward': (_Products(4, 2, 2), _Products(2, 3, 2)),
}
_NO_PRODUCTS = _Products(0, 0, 0)
_PRODUCTS = {
  'delta_rule': _DELTA,
  'delta_product': _DELTA,
  'diagonal_plus_low_rank': {
    'forward': (_NO_PRODUCTS, _Products(4, 4, 4)),
    'backward': (_NO_PRODUCTS, _Products(8, 12, 8)),
  },
  'linear_attention': {
    'forward': (_NO_PRODUCTS, _Products(2, 1, 1)),
    'backward': (_NO_PRODUCTS, _Products(4, 3, 2)),
  },
}


def _of_products(products: _Products, case) -> int:
  kv, ck, cv = products
  return 2 * (kv * case.K * case.V + CHUNK * (ck * case.K + cv * case.V))


def _parts(pass_name: str) -> tuple[str, ...]:
  both = ('forward', 'backward')
  return both if pass_name == 'forward_backward' else (pass_name,)


def flops(case: benchmark_cases.Case, pass_name: str) -> float:
  """Returns the floating-point operations of a call in chunkwise form.

  Args:
    case: the call.
    pass_name: one of `benchmark_programs.PASSES`.
  """
  n = case.keys_per_token
  per_token = 0.0
  if 'forward' in _parts(pass_name) and case.op != 'linear_attention':
    per_token += n * CHUNK**2 / 3
  for name in _parts(pass_name):
    per_key, per_query = _PRODUCTS[case.op][name]
    per_token += n * _of_products(per_key, case)
    per_token += _of_products(per_query, case)
  return case.B * case.T * case.value_heads * per_token


def _bytes(tree: Any) -> int:
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def compulsory_bytes(arguments: Any, results: Any, pass_name: str) -> int:
  """Returns the bytes that any implementation reads and writes.

  The forward pass reads the arguments and writes the results; the backward pass
  reads the arguments and the cotangents of results and writes gradients.

  Args:
    arguments: a tree of arrays or their shapes.
    results: likewise.
    pass_name: one of `benchmark_programs.PASSES`.
  """
  forward = _bytes(arguments) + _bytes(results)
  backward = forward + _bytes(arguments)
  parts = {'forward': forward, 'backward': backward}
  return sum(parts[name] for name in _parts(pass_name))
