import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from deltanet_jax.layers import embedding

AXES = ('data', 'fsdp', 'sequence', 'tensor')


def _value_and_gradient():
  draw = np.random.default_rng(0)
  table = jnp.asarray(draw.standard_normal((12, 8)), jnp.float32)
  tokens = jnp.asarray(draw.integers(12, size=(8, 4)), jnp.int32)
  weights = jnp.asarray(draw.standard_normal((8, 4, 8)), jnp.float32)

  def loss(table):
    x = embedding.lookup(table, tokens)
    return jnp.sum(x * weights), x

  gradient, x = jax.jit(jax.grad(loss, has_aux=True))(table)
  np.testing.assert_array_equal(x, table[tokens])
  return gradient


@pytest.mark.parametrize(
  'shape',
  [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 1, 4), (1, 1, 4, 2)]
  # What cuts neither tokens nor table, and the table alone.
  + [(1, 3, 2, 1), (1, 1, 8, 1)],
)
def test_a_mesh_changes_nothing(shape):
  expected = _value_and_gradient()
  devices = jax.devices()[: np.prod(shape)]
  mesh = jax.make_mesh(
    shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices
  )
  with jax.set_mesh(mesh):
    np.testing.assert_allclose(_value_and_gradient(), expected, rtol=1e-5)
