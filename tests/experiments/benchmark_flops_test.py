import functools
import math

import jax
import pytest

from experiments import benchmark_cases
from experiments import benchmark_flops
from experiments import benchmark_programs

SIZES = {'name': 'x', 'B': 1, 'T': 256, 'H': 2, 'K': 64, 'V': 32}
OPS = [
  {'op': 'delta_rule'},
  {'op': 'delta_product', 'keys_per_token': 2},
  {'op': 'diagonal_plus_low_rank', 'gate': 'channel'},
  {'op': 'linear_attention'},
]
IDS = [op['op'] for op in OPS]


def _inner(params):
  """Yields the jaxprs among the parameters of an equation."""
  for value in jax.tree.leaves(
    params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
  ):
    if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
      yield getattr(value, 'jaxpr', value)


def _dot_flops(jaxpr):
  """Counts the operations of all matrix products, scans unrolled."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left, _ = equation.invars
      depth = math.prod(left.aval.shape[axis] for axis in contracted)
      total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    times = equation.params.get('length', 1)
    total += times * sum(map(_dot_flops, _inner(equation.params)))
  return total


def _found_again(case):
  """Counts the products by which the backward pass finds states of chunks.

  They are none of the form's: `xla` could have kept what they find. The first
  state of a group is kept, and where the chunks of a group are not a loop its
  last product is not made.
  """
  product = 2 * case.B * case.T * case.value_heads * case.K * case.V
  if case.op == 'linear_attention':
    return 0
  if case.op == 'diagonal_plus_low_rank':
    return 2 * product
  n = case.keys_per_token
  chunks = n * case.T // benchmark_flops.CHUNK  # One group.
  return n * product * (chunks - 1) / chunks


# The inverse is counted by about a third of C^2 per row.
@pytest.mark.parametrize('op', OPS, ids=IDS)
@pytest.mark.parametrize(
  ('pass_name', 'tolerance'), [('forward', 0.03), ('forward_backward', 0.01)]
)
def test_the_count_is_that_of_the_products_of_the_program(
  op, pass_name, tolerance
):
  case = benchmark_cases.Case(**SIZES, **op, dtype='bfloat16')
  run = functools.partial(
    case.function, implementation='xla', chunk_size=benchmark_flops.CHUNK
  )
  function = benchmark_programs.pass_function(run, pass_name)
  arguments = jax.eval_shape(case.arguments)
  arguments.pop('g', None)  # Scores with decays per channel take a tree.
  prepare = functools.partial(benchmark_programs.given, run, pass_name)
  program = jax.make_jaxpr(function)(jax.eval_shape(prepare, arguments))
  again = _found_again(case) if pass_name == 'forward_backward' else 0
  assert benchmark_flops.flops(case, pass_name) == pytest.approx(
    _dot_flops(program.jaxpr) - again, rel=tolerance
  )


def test_the_count_is_the_formula():
  case = benchmark_cases.Case(op='delta_rule', **SIZES)
  count = benchmark_flops.flops(case, 'forward')
  # 2 (3 K V + C (2 K + 2 V)) + C^2 / 3 with C = 32, for 512 rows.
  by_hand = 512 * (2 * (3 * 64 * 32 + 32 * (128 + 64)) + 32**2 / 3)
  assert count == pytest.approx(by_hand)


@pytest.mark.parametrize(
  ('pass_name', 'per_token'), [('forward', 1026), ('forward_backward', 2822)]
)
def test_compulsory_bytes_are_those_of_every_array_once(pass_name, per_token):
  x = jax.ShapeDtypeStruct((2, 64, 4, 128), 'bfloat16')
  beta = jax.ShapeDtypeStruct((2, 64, 4), 'bfloat16')
  arguments = {'q': x, 'k': x, 'v': x, 'beta': beta}
  found = benchmark_flops.compulsory_bytes(arguments, x, pass_name)
  assert found == 2 * 64 * 4 * per_token
