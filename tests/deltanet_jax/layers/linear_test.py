"""The projections: dtypes, values and gradients."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.layers import linear


def _operands(dtype):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 3, 4)).astype(dtype)
  kernel = jax.random.normal(keys[1], (4, 5))
  return x, kernel, jax.random.normal(keys[2], (2, 3, 5))


def test_linear_is_bias_free_and_keeps_float32_parameters():
  layer = linear.linear(4, 5, dtype='bfloat16', rngs=nnx.Rngs(0))
  leaves = jax.tree.leaves(nnx.state(layer, nnx.Param))
  assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [
    ((4, 5), jnp.float32)
  ]
  assert layer(jnp.ones((2, 4))).dtype == jnp.bfloat16


def test_project_equals_the_plain_product_in_float32():
  x, kernel, weights = _operands(jnp.float32)

  def plain(x, kernel):
    return jnp.sum(weights * (x @ kernel))

  def ours(x, kernel):
    return jnp.sum(weights * linear.project_to_float32(x, kernel))

  for got, expected in zip(
    jax.value_and_grad(ours, (0, 1))(x, kernel),
    jax.value_and_grad(plain, (0, 1))(x, kernel),
    strict=True,
  ):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected
    )


def test_project_multiplies_in_the_dtype_of_x_both_ways():
  x, kernel, weights = _operands(jnp.bfloat16)

  def loss(x, kernel):
    return jnp.sum(weights * linear.project_to_float32(x, kernel))

  dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
  assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)
  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernel)
  products = [e for e in jaxpr.eqns if e.primitive.name == 'dot_general']
  dtypes = {v.aval.dtype.name for e in products for v in e.invars}
  assert dtypes == {'bfloat16'}
