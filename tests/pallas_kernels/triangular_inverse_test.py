import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import triangular_inverse
from tests import testing

SIZES = (1, 2, 15, 16, 17, 48, 64, 100, 128)
COSINES = (None, 0.9, 0.99, 1.0)
EPS = float(jnp.finfo(jnp.float32).eps)

_invert = jax.jit(triangular_inverse.unit_lower_inverse)


@functools.cache
def _lower(size, beta):
  """Returns beta K K^T below the diagonal for each cosine [4, 2, C, C]."""
  matrices = []
  for seed, cosine in enumerate(COSINES):
    rng = np.random.default_rng(seed)
    keys = testing.keys_with_cosine(rng, (2, size, 1, 64), cosine)[:, :, 0]
    noise = rng.standard_normal((2, size, 1))
    strengths = beta / (1 + np.exp(-4 - noise))
    matrices.append(np.tril(strengths * (keys @ keys.swapaxes(-1, -2)), -1))
  return np.stack(matrices).astype(np.float32)


def _errors(lower):
  """Returns max |error| / max |inverse| against float64, by cosine."""
  inverse = np.asarray(_invert(lower))
  eye = np.eye(lower.shape[-1])
  np.testing.assert_array_equal(
    np.triu(inverse), np.broadcast_to(eye, inverse.shape)
  )
  expected = np.linalg.inv(eye + lower.astype(np.float64))
  axes = (1, 2, 3)
  difference = np.max(np.abs(inverse - expected), axis=axes)
  return difference / np.max(np.abs(expected), axis=axes)


@pytest.mark.parametrize('size', SIZES)
def test_beta_near_1(size):
  assert np.all(_errors(_lower(size, 1.0)) < 8 * EPS)


@pytest.mark.parametrize('size', SIZES)
def test_beta_near_2(size):
  assert np.all(_errors(_lower(size, 1.99)) <= EPS)


@pytest.mark.drill
@pytest.mark.parametrize('size', range(1, 129))
def test_every_size(size):
  assert np.all(_errors(_lower(size, 1.0)) < 8 * EPS)


def test_no_leading_axes():
  lower = _lower(17, 1.0)
  batched = _invert(lower)
  for index in np.ndindex(4, 2):
    alone = _invert(lower[index])
    np.testing.assert_allclose(batched[index], alone, atol=4 * EPS, rtol=0)
