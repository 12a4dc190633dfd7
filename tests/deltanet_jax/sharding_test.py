from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
import numpy as np
import pytest

from deltanet_jax import sharding

BOTH = sharding.SHARDS


@pytest.mark.parametrize(
  ('sizes', 'width', 'expected'),
  [
    ({'data': 8}, 24, None),
    ({'fsdp': 8}, 24, 'fsdp'),
    ({'sequence': 8}, 24, 'sequence'),
    ({'fsdp': 2, 'sequence': 4}, 24, BOTH),
    ({'sequence': 4, 'fsdp': 2}, 24, BOTH),
    # What does not divide what is left of the width copies the parameter.
    ({'fsdp': 8, 'sequence': 2}, 24, 'fsdp'),
    ({'fsdp': 5, 'sequence': 2}, 24, 'sequence'),
    ({'fsdp': 5, 'sequence': 16}, 24, None),
  ],
)
def test_parameters_and_slots_are_cut_over_all_that_divides(
  sizes, width, expected
):
  mesh = AbstractMesh((*sizes.values(), 2), (*sizes, 'tensor'))
  block = {
    'mlp': {'up': {'kernel': jnp.zeros((3, width, 6))}},
    'mixer': {
      'o_proj': {'kernel': jnp.zeros((3, 4, width))},
      'q_conv': {'kernel': jnp.zeros((3, 4, 6))},
      'wide_kernel': jnp.zeros((3, 2, width)),
      'tall_kernel': jnp.zeros((3, width, 2)),
      'scale': jnp.zeros((3, width)),
    },
  }
  found = sharding.parameter_specs({'mu': block}, mesh)['mu']
  assert found == {
    'mlp': {'up': {'kernel': jax.P(None, expected, 'tensor')}},
    'mixer': {
      'o_proj': {'kernel': jax.P(None, 'tensor', expected)},
      'q_conv': {'kernel': jax.P(None, None, 'tensor')},
      'wide_kernel': jax.P(None, None, expected),
      'tall_kernel': jax.P(None, expected, None),
      'scale': jax.P(None, None),
    },
  }


@pytest.mark.parametrize('axes', [BOTH, BOTH[::-1]])
@pytest.mark.parametrize(
  'tokens', [jax.P('fsdp', 'sequence'), jax.P('fsdp'), jax.P()], ids=str
)
def test_shares_are_gathered_and_gradients_summed(axes, tokens):
  draw = np.random.default_rng(0)
  kernel = draw.integers(9, size=(16, 6)).astype(np.float32)
  x = draw.integers(9, size=(4, 8)).astype(np.float32)  # A number per token.
  mesh = jax.make_mesh((2, 4), axes, axis_types=(AxisType.Auto,) * 2)

  def body(x, kernel):
    whole = sharding.gather_share(kernel, spec)
    return whole, sharding.reduce_to_share(whole * x.sum(), spec, tokens)

  with jax.set_mesh(mesh):
    spec = sharding.parameter_spec('output.kernel', kernel.shape)
    assert spec == jax.P(BOTH, None)
    run = sharding.shard_map(body, (tokens, spec), (jax.P(), spec))
    whole, gradient = run(x, kernel)
  np.testing.assert_array_equal(whole, kernel)
  np.testing.assert_array_equal(gradient, kernel * x.sum())


def test_leaves_of_a_module_are_gathered_and_their_gradients_cut():
  kernel = jnp.ones((8, 6))
  mesh = jax.make_mesh((2, 2, 2), (*BOTH, 'tensor'), (AxisType.Auto,) * 3)
  state = nnx.State({'mlp': {'up': {'kernel': nnx.Param(kernel)}}})

  def run(state):
    whole, pullback = jax.vjp(sharding.gather, state)
    return whole, pullback(whole)[0]

  with jax.set_mesh(mesh):
    whole, gradient = map(jax.tree.leaves, jax.jit(run)(state))
  assert [x.sharding.spec for x in whole] == [jax.P(None, 'tensor')]
  assert [x.sharding.spec for x in gradient] == [jax.P(BOTH, 'tensor')]
