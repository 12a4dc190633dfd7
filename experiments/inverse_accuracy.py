"""Errors of the triangular inverse of a chunk against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import triangular_inverse

COSINES, BETAS, CHUNKS = (0.0, 0.9, 0.99, 1.0), (1.0, 2.0), (16, 32, 64, 128)
BATCH, KEY_DIM = 16, 128


def lower(cosine: float, beta: float, chunk: int) -> np.ndarray:
  """Returns beta strict_tril(K K^T) [16, C, C] of unit keys, float32.

  Any two keys have about the cosine; beta is for all tokens what is given.
  """
  rng = np.random.default_rng(0)
  noise = rng.standard_normal((BATCH, chunk, KEY_DIM)) / KEY_DIM**0.5
  common = rng.standard_normal((BATCH, 1, KEY_DIM)) / KEY_DIM**0.5
  keys = cosine**0.5 * common + (1 - cosine) ** 0.5 * noise
  keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
  gram = np.tril(beta * (keys @ keys.swapaxes(-1, -2)), -1)
  return gram.astype(np.float32)


def errors(matrix: np.ndarray) -> dict[str, float]:
  """Returns max |error| / max |inverse| by the precision of the inside."""
  exact = np.linalg.inv(np.eye(matrix.shape[-1]) + matrix.astype(np.float64))
  inverse = triangular_inverse.unit_lower_inverse
  inside = {
    'float32': functools.partial(inverse, exact=False),
    'float64': inverse,
  }
  with jax.default_matmul_precision('highest'):
    found = {n: jax.jit(f)(jnp.asarray(matrix)) for n, f in inside.items()}
  scale = np.max(np.abs(exact))
  return {
    n: float(np.max(np.abs(np.float64(x) - exact)) / scale)
    for n, x in found.items()
  }
