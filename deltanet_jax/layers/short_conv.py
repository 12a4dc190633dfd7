"""Short depthwise causal convolution, with its own VJP.

Of y_t = sum_{j < W} w_j x_{t-j} the gradients are sums of the same kind,

    dx_t = sum_{j < W} w_j dy_{t+j}        dw_j = sum_t dy_t x_{t-j},

so that nothing but x is saved, where JAX would save x once for every tap.
"""

import functools
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


# Stands for padding among the numbers of runs.
_PADDING = -1


def _shifted(x, distance: int, fill=0):
  """Returns x_{t - distance} for x [B, T, ...], `fill` beyond the row."""
  length = x.shape[1]
  widths = [(0, 0)] * x.ndim
  widths[1] = (max(distance, 0), max(-distance, 0))
  start = max(-distance, 0)
  # XLA reads x through the padding; what is concatenated it would store.
  padded = jnp.pad(x, widths, constant_values=fill)
  return padded[:, start : start + length]


def _neighbor(x, runs, distance: int):
  """Returns float32 x_{t - distance}, 0 where that is not of t's document."""
  x = _shifted(x, distance).astype(jnp.float32)
  if runs is None:
    return x
  is_seen = (runs != _PADDING) & (_shifted(runs, distance, _PADDING) == runs)
  return jnp.where(is_seen[..., None], x, 0)


def _by_distance(kernel):
  """Returns (j, w_j) of every tap, the farthest first."""
  return list(zip(reversed(range(len(kernel))), kernel, strict=True))


@jax.custom_vjp
def _taps(x, kernel, runs):
  """Returns float32 y [B, T, D] of x [B, T, D], 0 before the row."""
  return _forward(x, kernel, runs)[0]


def _forward(x, kernel, runs):
  y = sum(
    _neighbor(x, runs, j) * tap[None, None] for j, tap in _by_distance(kernel)
  )
  return y, (x, kernel, runs)


def _backward(residuals, dy):
  x, kernel, runs = residuals
  pairs = _by_distance(kernel)
  dx = sum(_neighbor(dy, runs, -j) * tap[None, None] for j, tap in pairs)
  # A sum for each tap: in one over all of them XLA reads x and dy W times.
  dkernel = [jnp.sum(dy * _neighbor(x, runs, j), (0, 1)) for j, _ in pairs]
  return dx.astype(x.dtype), jnp.stack(dkernel).astype(kernel.dtype), None


_taps.defvjp(_forward, _backward)


def _runs(ids):
  """Returns the number of every token's run, or None for one document."""
  if ids is None:
    return None
  return jnp.where(ids != 0, segments.run_numbers(ids), _PADDING)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_last(x, size: int):
  """Returns x [B, T, D] and its last tokens, size of them.

  The gradient of these is added in place; JAX would make an array of it that is
  as large as x.
  """
  return x, x[:, x.shape[1] - size :]


def _with_last_forward(x, size):
  return _with_last(x, size), None


def _with_last_backward(size, residuals, cotangents):
  del residuals
  dx, dlast = cotangents
  start = dx.shape[1] - size
  return (
    jax.lax.dynamic_update_slice_in_dim(dx, dx[:, start:] + dlast, start, 1),
  )


_with_last.defvjp(_with_last_forward, _with_last_backward)


def _from_past(past: ShortConvCache, kernel, ids, length: int):
  """Returns what the tokens before a row add to it, to W - 1 tokens at most."""
  size = kernel.shape[0] - 1
  reached = min(size, length)
  x = jnp.pad(past.inputs, [(0, 0), (0, reached), (0, 0)])
  if ids is not None:
    ids = jnp.concatenate([past.segment_ids, ids[:, :reached]], axis=1)
  y = _taps(x, kernel, _runs(ids))[:, size:]
  return jnp.pad(y, [(0, 0), (0, length - reached), (0, 0)])


def _convolve(x, ids, kernel, bias, past: ShortConvCache | None):
  """Convolves x [B, T, D] of the documents `ids`; None: one document."""
  y = _taps(x, kernel, _runs(ids))
  if past is not None:
    y += _from_past(past, kernel, ids, x.shape[1])
  if bias is not None:
    y += bias[None, None]
    if ids is not None:
      y = jnp.where((ids != 0)[..., None], y, 0)
  return y.astype(x.dtype)


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
    x = x.astype(jnp.dtype(self.dtype))
    bias = self.bias[...] if self.use_bias else None
    if cache is None:
      return self._without_cache(x, segment_ids, bias), None
    batch, length, _ = x.shape
    if segment_ids is None:
      nothing = jnp.zeros((batch,), jnp.int32)
      last = segments.last_id(cache.segment_ids, nothing)
      segment_ids = segments.continued_ids(last, length)
    y = _convolve(x, segment_ids, self.kernel[...], bias, cache)
    inputs = jnp.concatenate([cache.inputs, x], axis=1)
    ids = jnp.concatenate([cache.segment_ids, segment_ids], axis=1)
    return y, ShortConvCache(inputs[:, length:], ids[:, length:])

  def _without_cache(self, x, segment_ids, bias):
    """Convolves rows that start here, each device its part of the mesh."""
    size = self.width - 1

    def halo(x, axes):
      return None if x is None else sequence_parallel.halo(x, size, axes)

    def convolve(arrays, time_axes):
      x, ids = arrays['x'], arrays['segment_ids']
      past = None
      if time_axes is not None and size:
        x, last = _with_last(x, min(size, x.shape[1]))
        past = ShortConvCache(halo(last, time_axes), halo(ids, time_axes))
      return (_convolve(x, ids, arrays['kernel'], arrays['bias'], past),)

    # A channel is to the mesh what a head is: it knows nothing of the others.
    arguments = {
      'x': (x, 'B T H'),
      'segment_ids': (segment_ids, 'B T'),
      'kernel': (self.kernel[...], 'W H'),
      'bias': (bias, 'H'),
    }
    return sharded_call.sharded_call(convolve, arguments, ('B T H',))[0]
