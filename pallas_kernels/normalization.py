"""Normalisation of queries and keys."""

import jax
import jax.numpy as jnp

from pallas_kernels import argument_checks

EPS = 1e-6


def l2_normalize(x: jax.Array) -> jax.Array:
  """Returns x / sqrt(sum(x^2) + 1e-6) over the last axis, in x's dtype."""
  y = x.astype(argument_checks.state_dtype(x))
  norm = jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + EPS)
  return (y * norm).astype(x.dtype)
