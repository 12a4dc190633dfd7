"""What holds for every op alike: splits of a sequence, and derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from tests import testing

LENGTH = 21
OPS = (
  'delta_rule',
  'delta_product',
  'diagonal_plus_low_rank',
  'linear_attention',
)
IMPLEMENTATIONS = ('recurrent', 'xla')
STATE = 'initial_state'

for_each_op = pytest.mark.parametrize('op', OPS)
for_each_implementation = pytest.mark.parametrize(
  'implementation', IMPLEMENTATIONS
)


def _shapes(op, length):
  """Returns the shapes of an op's arguments, g per head, HV = 2 H."""
  keys, values = (1, length, 1, 4), (1, length, 2, 3)
  shapes = {'q': keys, 'k': keys, 'v': values, 'g': values[:-1]}
  shapes[STATE] = (1, 2, 4, 3)
  more = {
    'delta_rule': {'beta': values[:-1]},
    'delta_product': {
      'k': (1, length, 2, 1, 4),
      'v': (1, length, 2, 2, 3),
      'beta': (1, length, 2, 2),
    },
    'diagonal_plus_low_rank': {'a': keys, 'b': keys},
    'linear_attention': {'bonus': (2, 4)},
  }
  return shapes | more[op]


def _arguments(op, length=LENGTH, seed=0):
  rng = np.random.default_rng(seed)
  shapes = _shapes(op, length)
  arrays = {n: rng.standard_normal(shape) / 2 for n, shape in shapes.items()}
  arrays['g'] = -np.exp(arrays['g'] - 1)
  if 'beta' in arrays:
    arrays['beta'] = 1 / (1 + np.exp(-arrays['beta']))
  return {name: jnp.float32(a) for name, a in arrays.items()}


@functools.cache
def _run(op, implementation):
  return jax.jit(
    functools.partial(
      getattr(pallas_kernels, op), chunk_size=8, implementation=implementation
    )
  )


def _loss(op, implementation, arguments):
  o, state = _run(op, implementation)(**arguments)
  weight = jnp.cos(jnp.arange(o.size, dtype=o.dtype)).reshape(o.shape)
  return jnp.sum(weight * o) + jnp.sum(state**2)


def _gradient(op, implementation, arguments):
  return jax.grad(functools.partial(_loss, op, implementation))(arguments)


def _split(arguments, start, stop, state):
  """Returns the arguments of the tokens from start to stop."""
  part = {
    name: x if name == 'bonus' else x[:, start:stop]
    for name, x in arguments.items()
  }
  return part | {STATE: state}


def _assert_close(actual, expected, limit):
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert testing.error(np.float64(a), np.float64(e)) < limit


@pytest.mark.drill
@for_each_op
@for_each_implementation
@pytest.mark.parametrize('split', range(1, 70))
def test_every_split(op, implementation, split):
  arguments = _arguments(op, length=70)
  run = _run(op, implementation)
  whole = run(**arguments)
  first, state = run(**_split(arguments, 0, split, arguments[STATE]))
  second, state = run(**_split(arguments, split, 70, state))
  joined = jnp.concatenate([first, second], axis=1)
  _assert_close((joined, state), whole, 2e-6)


def _difference(function, arguments, direction, step=1e-5):
  """Returns the central difference of a function along a direction."""

  def at(shift):
    return function(
      jax.tree.map(lambda x, d: x + shift * d, arguments, direction)
    )

  return jax.tree.map(
    lambda up, down: (up - down) / (2 * step), at(step), at(-step)
  )


def _wide(op):
  """Returns arguments and a direction in float64."""
  return [
    {n: jnp.asarray(x, jnp.float64) for n, x in _arguments(op, 9, s).items()}
    for s in (0, 1)
  ]


@for_each_op
def test_recurrent_has_forward_mode(op):
  with jax.enable_x64(True):
    arguments, direction = _wide(op)
    run = lambda arguments: _run(op, 'recurrent')(**arguments)  # noqa: E731
    _, slope = jax.jvp(run, (arguments,), (direction,))
    _assert_close(slope, _difference(run, arguments, direction), 1e-7)


@for_each_op
def test_recurrent_has_second_derivatives(op):
  with jax.enable_x64(True):
    arguments, direction = _wide(op)
    gradient = functools.partial(_gradient, op, 'recurrent')

    def along(arguments):
      slopes = jax.tree.map(jnp.vdot, gradient(arguments), direction)
      return sum(slopes.values())

    actual = jax.grad(along)(arguments)
    _assert_close(actual, _difference(gradient, arguments, direction), 1e-7)


@for_each_op
def test_xla_refuses_second_derivatives(op):
  arguments = _arguments(op)
  gradient = functools.partial(_gradient, op, 'xla')

  def loss(v):
    changed = gradient(arguments | {'v': v})
    return sum(jnp.sum(jnp.sin(d)) for d in changed.values())

  with pytest.raises(NotImplementedError, match="use implementation='recurr"):
    jax.grad(loss)(arguments['v'])


@for_each_op
def test_xla_refuses_forward_mode(op):
  arguments = _arguments(op)
  with pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(
      lambda v: _run(op, 'xla')(**arguments | {'v': v}),
      (arguments['v'],),
      (arguments['v'],),
    )
