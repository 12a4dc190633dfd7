"""Rotary positions: only their differences matter."""

import numpy as np
import pytest

from deltanet_jax.layers import rotary

X = np.random.default_rng(0).normal(size=(1, 2, 3, 6)).astype(np.float32)
FREQUENCIES = rotary.frequencies(6, 100.0)


def _rotated(position):
  positions = np.full((1, 2), position, np.int32)
  return np.asarray(rotary.rotate(X, positions, FREQUENCIES))


def test_products_hang_on_the_difference():
  def product(a, b):
    return np.einsum('bthk,bthk->bth', _rotated(a), _rotated(b))

  np.testing.assert_allclose(product(7, 2), product(105, 100), atol=1e-4)
  assert np.max(np.abs(product(7, 2) - product(7, 3))) > 0.1


def test_rotates_pairs_by_angles():
  x = X[0, 0, 0].astype(np.float64)
  z = x[:3] + 1j * x[3:]
  angles = 5 * 100.0 ** -(np.arange(3) / 3)
  expected = z * np.exp(1j * angles)
  actual = _rotated(5)[0, 0, 0]
  np.testing.assert_allclose(actual[:3], expected.real, atol=1e-5)
  np.testing.assert_allclose(actual[3:], expected.imag, atol=1e-5)


def test_positions_go_on():
  layer = rotary.Positions()
  first, cache = layer(X, cache=layer.init_cache(1))
  second, _ = layer(X, cache=cache)
  np.testing.assert_array_equal(first, [[0, 1]])
  np.testing.assert_array_equal(second, [[2, 3]])


def test_refuses_odd_heads():
  with pytest.raises(ValueError, match='even head_dim, got 5'):
    rotary.frequencies(5, 100.0)
