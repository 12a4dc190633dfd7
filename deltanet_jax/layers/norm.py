"""Normalisations, computed in float32 and returned in the input's dtype."""

from flax import nnx
import jax
import jax.numpy as jnp

_EPS = 1e-6


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation over the last axis.

  y = scale * x / sqrt(mean(x^2) + eps), with a learned `scale` [features].
  """

  def __init__(self, features: int, *, eps: float = 1e-6):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((features,), jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x [..., features]."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
    return (y * scale).astype(x.dtype)


class HeadNorm(nnx.Module):
  """Layer normalisation of every head, with a scale and a bias of its own.

  y = scale * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last axis, with
  `scale` and `bias` [H, features]: group normalisation with a group per head.
  """

  def __init__(self, num_heads: int, features: int, *, eps: float = 1e-5):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones((num_heads, features), jnp.float32))
    self.bias = nnx.Param(jnp.zeros((num_heads, features), jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises x [B, T, H, features]."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    scale, bias = self.scale[...][None, None], self.bias[...][None, None]
    return (y * scale + bias).astype(x.dtype)


def l1_normalize(x: jax.Array) -> jax.Array:
  """Returns x / (sum(|x|) + 1e-6) over the last axis."""
  y = x.astype(jnp.float32)
  total = jnp.sum(jnp.abs(y), axis=-1, keepdims=True)
  return (y / (total + _EPS)).astype(x.dtype)
