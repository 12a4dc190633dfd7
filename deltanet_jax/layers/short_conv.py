"""Short depthwise causal convolution."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import options
from deltanet_jax.layers import segments
from pallas_kernels import sequence_parallel
from pallas_kernels import sharded_call


class ShortConvCache(NamedTuple):
  """The last W - 1 tokens.

  Attributes:
    inputs: [B, W - 1, D] in the layer's dtype.
    segment_ids: int32 [B, W - 1]; 0 before the first token.
  """

  inputs: jax.Array
  segment_ids: jax.Array


class ShortConv(nnx.Module):
  """y_t = sum_{j < W} kernel[W - 1 - j] * x_{t-j} (+ bias), per channel.

  A tap that would reach into another document, into padding or before the row
  counts as 0, and so does the output at padding. There is no activation: what
  follows the convolution is the caller's.
  """

  def __init__(
    self,
    features: int,
    *,
    width: int = 4,
    use_bias: bool = False,
    dtype: options.DType = 'float32',
    rngs: nnx.Rngs,
  ):
    self.features = features
    self.width = width
    self.dtype = dtype
    bound = width**-0.5
    self.kernel = nnx.Param(
      jax.random.uniform(
        rngs.params(), (width, features), jnp.float32, -bound, bound
      )
    )
    if use_bias:
      self.bias = nnx.Param(
        jax.random.uniform(
          rngs.params(), (features,), jnp.float32, -bound, bound
        )
      )
    self.use_bias = use_bias

  def init_cache(self, batch: int) -> ShortConvCache:
    """Returns the cache of a row that has seen no token."""
    past = (batch, self.width - 1)
    return ShortConvCache(
      inputs=jnp.zeros((*past, self.features), jnp.dtype(self.dtype)),
      segment_ids=jnp.zeros(past, jnp.int32),
    )

  def __call__(
    self,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: ShortConvCache | None = None,
  ) -> tuple[jax.Array, ShortConvCache | None]:
    """Convolves x [B, T, D]; sums in float32.

    Args:
      x: [B, T, D].
      segment_ids: int32 [B, T], 0 is padding; None: the row's last document
        goes on.
      cache: the past of the rows; None: they start here.

    Returns:
      y [B, T, D] in the layer's dtype, and the new cache (None without one).
    """
    if cache is None:
      return self._without_cache(x.astype(jnp.dtype(self.dtype)), segment_ids)
    batch, length, _ = x.shape
    if segment_ids is None:
      nothing = jnp.zeros((batch,), jnp.int32)
      last = segments.last_id(cache.segment_ids, nothing)
      segment_ids = segments.continued_ids(last, length)
    x = x.astype(cache.inputs.dtype)
    inputs = jnp.concatenate([cache.inputs, x], axis=1)
    ids = jnp.concatenate([cache.segment_ids, segment_ids], axis=1)
    bias = self.bias[...] if self.use_bias else None
    y = self._taps(inputs, ids, self.kernel[...], bias)
    return y, ShortConvCache(inputs[:, length:], ids[:, length:])

  def _without_cache(self, x, segment_ids):
    """Convolves rows that start here, each device its part of the mesh."""

    def convolve(arrays, time_axes):
      def extend(y):
        if y is None or self.width == 1:
          return y
        past = sequence_parallel.halo(y, self.width - 1, time_axes)
        return jnp.concatenate([past, y], axis=1)

      kernel, bias = arrays['kernel'], arrays['bias']
      x, ids = extend(arrays['x']), extend(arrays['segment_ids'])
      return (self._taps(x, ids, kernel, bias),)

    # A channel is to the mesh what a head is: it knows nothing of the others.
    arguments = {
      'x': (x, 'B T H'),
      'segment_ids': (segment_ids, 'B T'),
      'kernel': (self.kernel[...], 'W H'),
      'bias': (self.bias[...] if self.use_bias else None, 'H'),
    }
    (y,) = sharded_call.sharded_call(convolve, arguments, ('B T H',))
    return y, None

  def _taps(self, inputs, ids, kernel, bias):
    """Sums the taps over inputs [B, W - 1 + T, D]; ids None: one document."""
    now = self.width - 1
    length = inputs.shape[1] - now
    runs = None if ids is None else segments.run_numbers(ids)

    def tap(start):
      window = slice(start, start + length)
      values = inputs[:, window].astype(jnp.float32) * kernel[None, None, start]
      if ids is None:
        return values
      seen = (ids[:, window] != 0) & (ids[:, now:] != 0)
      seen &= runs[:, window] == runs[:, now:]
      return jnp.where(seen[..., None], values, 0)

    y = sum(tap(start) for start in range(self.width))
    if bias is not None:
      y = y + bias[None, None]
      if ids is not None:
        y = jnp.where((ids[:, now:] != 0)[..., None], y, 0)
    return y.astype(inputs.dtype)
