"""The token before: RWKV's shift by one, within a document."""

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import options
from deltanet_jax.layers import segments
from deltanet_jax.layers import short_conv


class TokenShift(nnx.Module):
  """Returns x_{t-1}, 0 at the start of a document."""

  def __init__(self, features: int, *, dtype: options.DType = 'float32'):
    self.features = features
    self.dtype = dtype

  def init_cache(self, batch: int) -> short_conv.ShortConvCache:
    """Returns the cache of a row that has seen no token."""
    return short_conv.ShortConvCache(
      inputs=jnp.zeros((batch, 1, self.features), jnp.dtype(self.dtype)),
      segment_ids=jnp.zeros((batch, 1), jnp.int32),
    )

  def __call__(
    self,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: short_conv.ShortConvCache | None = None,
  ) -> tuple[jax.Array, short_conv.ShortConvCache | None]:
    """Shifts x [B, T, D]; arguments and results as of `short_conv`."""
    batch, length, _ = x.shape
    past = self.init_cache(batch) if cache is None else cache
    if segment_ids is None:
      last = past.segment_ids[:, 0]
      segment_ids = segments.continued_ids(last, length)
    inputs = jnp.concatenate([past.inputs, x.astype(past.inputs.dtype)], axis=1)
    ids = jnp.concatenate([past.segment_ids, segment_ids], axis=1)
    is_same = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
    y = jnp.where(is_same[..., None], inputs[:, :-1], 0)
    new = short_conv.ShortConvCache(inputs[:, length:], ids[:, length:])
    return y, None if cache is None else new
