"""Feature maps against hand-computed values."""

import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.layers import feature_maps

SIGMOID_2 = 1 / (1 + np.exp(-2.0))


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('silu', [-2 * (1 - SIGMOID_2), 0, 2 * SIGMOID_2]),
    ('relu', [0, 0, 2]),
    ('elu_plus_one', [np.exp(-2.0), 1, 3]),
    ('identity', [-2, 0, 2]),
  ],
)
def test_values(name, expected):
  x = jnp.array([-2.0, 0.0, 2.0])
  y = feature_maps.apply_feature_map(name, x)
  np.testing.assert_allclose(y, expected, rtol=1e-6)
  low = feature_maps.apply_feature_map(name, x.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16


def test_unknown_name():
  with pytest.raises(ValueError, match="must be one of silu, .* got 'tanh'"):
    feature_maps.apply_feature_map('tanh', jnp.zeros(1))
