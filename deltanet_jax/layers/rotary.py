"""Rotary positions (Su et al., arXiv 2104.09864)."""

from flax import nnx
import jax
import jax.numpy as jnp


class Positions(nnx.Module):
  """Numbers the tokens of a row, from call to call; padding counts.

  Only differences of positions enter what rotary layers compute, so a new
  document does not start at 0. The cache is int32 [B].
  """

  def init_cache(self, batch: int) -> jax.Array:
    """Returns the position of the first token."""
    return jnp.zeros((batch,), jnp.int32)

  def __call__(
    self,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns int32 [B, T] for x [B, T, ...] and the new cache."""
    del segment_ids
    length = x.shape[1]
    start = self.init_cache(x.shape[0]) if cache is None else cache
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    return positions, None if cache is None else start + length


def rotate(
  x: jax.Array, positions: jax.Array, frequencies: jax.Array
) -> jax.Array:
  """Rotates the pairs (x_i, x_{i + K/2}) by position times frequency_i.

  Computed in float32 and returned in x's dtype.

  Args:
    x: [B, T, H, K], K even.
    positions: int32 [B, T].
    frequencies: float32 [K / 2], radians per token.

  Returns:
    [B, T, H, K]; the product of two such vectors hangs on the difference of
    their positions alone.
  """
  angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
  cos, sin = (f(angles)[:, :, None] for f in (jnp.cos, jnp.sin))
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return rotated.astype(x.dtype)


def frequencies(head_dim: int, base: float) -> jax.Array:
  """Returns base^(-2 i / K) for i < K / 2.

  Raises:
    ValueError: K is odd.
  """
  if head_dim % 2:
    raise ValueError(f'rotary positions need an even head_dim, got {head_dim}')
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  return base**-exponents
