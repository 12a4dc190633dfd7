"""The normalisation against its equation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import normalization


@pytest.mark.parametrize('scale', [1.0, 1e-3])
def test_divides_by_the_norm(scale):
  x = np.random.default_rng(0).normal(size=(2, 3, 5)) * scale
  expected = x / np.sqrt(np.sum(x**2, -1, keepdims=True) + 1e-6)
  y = normalization.l2_normalize(jnp.float32(x))
  np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_zero_stays_zero_with_a_finite_gradient():
  x = jnp.zeros((1, 4))
  np.testing.assert_array_equal(normalization.l2_normalize(x), x)
  gradient = jax.grad(lambda x: jnp.sum(normalization.l2_normalize(x)))(x)
  assert np.all(np.isfinite(gradient))


def test_sums_are_float32_in_bfloat16():
  x = jnp.full((1, 4096), 3.0, jnp.bfloat16)
  y = normalization.l2_normalize(x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y.astype(jnp.float32), 2.0**-6)
