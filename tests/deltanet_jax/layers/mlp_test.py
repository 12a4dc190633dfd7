"""SwiGLU against its equation."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.layers import mlp


def test_equation():
  layer = mlp.SwiGLU(4, 6, rngs=nnx.Rngs(0))
  x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  gate, up, down = (
    np.asarray(part.kernel[...], np.float64)
    for part in (layer.gate, layer.up, layer.down)
  )
  gated = x @ gate
  expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
  np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4)


def test_has_three_matrices():
  layer = mlp.SwiGLU(4, 6, dtype='bfloat16', rngs=nnx.Rngs(0))
  shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(layer))]
  assert sorted(shapes) == [(4, 6), (4, 6), (6, 4)]
  assert layer(jnp.ones((1, 1, 4))).dtype == jnp.bfloat16
