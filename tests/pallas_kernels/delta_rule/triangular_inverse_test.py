import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import triangular_inverse
from tests import testing


def _lower(size, cosine, beta, seed=0):
  rng = np.random.default_rng(seed)
  keys = testing.keys_with_cosine(rng, (2, size, 1, 64), cosine)[:, :, 0]
  strengths = beta / (1 + np.exp(-4 - rng.standard_normal((2, size, 1))))
  lower = np.tril(strengths * (keys @ keys.swapaxes(-1, -2)), -1)
  return lower.astype(np.float32)


def _error(lower):
  inverse = np.asarray(triangular_inverse.unit_lower_inverse(lower))
  eye = np.eye(lower.shape[-1])
  expected = np.linalg.inv(eye + lower.astype(np.float64))
  np.testing.assert_array_equal(np.triu(inverse), np.broadcast_to(eye, inverse.shape))
  return np.max(np.abs(inverse - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize('cosine', [None, 0.9, 0.99, 1.0])
@pytest.mark.parametrize('size', [1, 2, 15, 16, 17, 32, 48, 64, 100, 128])
def test_beta_near_1(size, cosine):
  assert _error(_lower(size, cosine, 1.0)) < 1e-6


@pytest.mark.parametrize('cosine', [None, 0.9, 0.99, 1.0])
@pytest.mark.parametrize('size', [1, 2, 15, 16, 17, 32, 48, 64, 100, 128])
def test_beta_near_2(size, cosine):
  eps = float(jnp.finfo(jnp.float32).eps)
  assert _error(_lower(size, cosine, 1.99)) <= size * eps


@pytest.mark.drill
@pytest.mark.parametrize('size', range(1, 129))
def test_every_size(size):
  assert _error(_lower(size, 0.9, 1.0)) < 1e-6


def test_leading_axes_and_jit():
  lower = np.stack([_lower(20, None, 1.0, seed) for seed in range(3)])
  batched = jax.jit(triangular_inverse.unit_lower_inverse)(lower)
  for b, i in np.ndindex(3, 2):
    alone = triangular_inverse.unit_lower_inverse(jnp.asarray(lower[b, i]))
    np.testing.assert_allclose(batched[b, i], alone, atol=1e-6, rtol=0)
