"""Normalisations against their equations in float64."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax.layers import norm

X = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)


def test_rms_norm():
  layer = norm.RMSNorm(5, eps=0.1)
  nnx.update(layer, {'scale': jnp.arange(5.0)})
  x = X.astype(np.float64)
  expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 0.1) * np.arange(5)
  np.testing.assert_allclose(layer(jnp.asarray(X)), expected, rtol=1e-5)


def test_l1():
  x = X.astype(np.float64)
  expected = x / np.sum(np.abs(x), -1, keepdims=True)
  np.testing.assert_allclose(
    norm.l1_normalize(jnp.asarray(X)), expected, rtol=1e-5
  )


def test_zero_stays_zero_with_a_finite_gradient():
  x = jnp.zeros((1, 4))
  np.testing.assert_array_equal(norm.l1_normalize(x), x)
  gradient = jax.grad(lambda x: jnp.sum(norm.l1_normalize(x)))(x)
  assert np.all(np.isfinite(gradient))


def test_statistics_are_float32_in_bfloat16():
  x = jnp.full((1, 1024), 3.0, jnp.bfloat16)
  y = norm.RMSNorm(1024)(x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y.astype(jnp.float32), 1)
  assert norm.l1_normalize(x).dtype == jnp.bfloat16


def test_head_norm_normalises_every_head_alone():
  x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
  layer = norm.HeadNorm(4, 5, eps=0.1)
  layer.scale.set_value(layer.scale[...] * 2)
  layer.bias.set_value(layer.bias[...] + 1)
  centred = x - x.mean(-1, keepdims=True)
  deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 0.1)
  np.testing.assert_allclose(layer(x), 2 * centred / deviation + 1, rtol=1e-4)
