"""A projection through few channels."""

from flax import nnx
import jax.numpy as jnp
import numpy as np

from deltanet_jax.layers import low_rank

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)


def test_equals_its_equation():
  layer = low_rank.LowRank(
    8, 2, 5, activation=jnp.tanh, use_bias=True, rngs=nnx.Rngs(0)
  )
  layer.up.bias.set_value(jnp.arange(5.0))
  down, up = (np.asarray(x.kernel[...]) for x in (layer.down, layer.up))
  expected = np.tanh(X @ down) @ up + np.arange(5.0)
  np.testing.assert_allclose(layer(X), expected, atol=1e-6)


def test_without_activation_and_bias_it_is_linear():
  layer = low_rank.LowRank(8, 2, 5, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(layer(2 * X), 2 * layer(X), rtol=1e-5)
