"""Causal convolution with a filter as long as the context, by FFT.

    y_t = sum_{s < L} h_s x_{t-s}, per channel

One document is one product of spectra. With several in a row the sum must not
leave the document of token t, and no product of spectra does that. But a row is
halved again and again, and between two halves [a, m) and [m, b) only one
document reaches across, the one at m: its tokens on the left, convolved with h,
are added to its tokens on the right. Every pair of tokens is met at exactly one
halving, so log2(T) transforms of half as much each give the exact result. What
the future holds does not enter, not even by rounding.

A tap that would reach into another document, into padding or before the row
counts as 0; padding in a document counts as a position.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.layers import segments


class LongConvCache(NamedTuple):
  """The last L - 1 tokens.

  Attributes:
    inputs: [B, L - 1, R].
    segment_ids: int32 [B, L - 1]; 0 before the first token.
  """

  inputs: jax.Array
  segment_ids: jax.Array


def _filter_of_length(h, length):
  """Cuts or pads h [L, C] to [length, C]."""
  h = h[:length]
  return jnp.pad(h, ((0, length - h.shape[0]), (0, 0)))


def _circular(x, h):
  """Convolves x [..., n, C] with h [n, C] circularly."""
  length = x.shape[-2]
  spectrum = jnp.fft.rfft(h, axis=0)
  spectrum = spectrum.reshape(*(1,) * (x.ndim - 2), *spectrum.shape)
  spectrum = jnp.fft.rfft(x, axis=-2) * spectrum
  return jnp.fft.irfft(spectrum, length, axis=-2)


def convolve(x: jax.Array, h: jax.Array) -> jax.Array:
  """Convolves one document per row: float32 x [B, T, C] with h [L, C]."""
  length = x.shape[1]
  size = 1 << (2 * length - 1).bit_length()
  padded = jnp.pad(x, ((0, 0), (0, size - length), (0, 0)))
  h = _filter_of_length(_filter_of_length(h, length), size)
  return _circular(padded, h)[:, :length]


def convolve_segments(
  x: jax.Array, h: jax.Array, segment_ids: jax.Array
) -> jax.Array:
  """Convolves every document alone; see the module.

  Args:
    x: float32 [B, T, C].
    h: float32 [L, C].
    segment_ids: int32 [B, T], 0 is padding.

  Returns:
    [B, T, C], 0 at padding.
  """
  batch, length, channels = x.shape
  size = 1 << (length - 1).bit_length()
  valid = (segment_ids != 0)[..., None]
  runs = segments.run_numbers(segment_ids)
  runs = jnp.pad(runs, ((0, 0), (0, size - length)), constant_values=-1)
  x = jnp.pad(jnp.where(valid, x, 0), ((0, 0), (0, size - length), (0, 0)))
  y = x * h[0][None, None]
  half = 1
  while half < size:
    pairs = (batch, size // (2 * half), 2, half)
    left, right = (runs.reshape(pairs)[:, :, i] for i in range(2))
    across = left[:, :, -1:]  # The document at the border.
    from_left = x.reshape(*pairs, channels)[:, :, 0]
    from_left = jnp.where((left == across)[..., None], from_left, 0)
    from_left = jnp.pad(from_left, ((0, 0), (0, 0), (0, half), (0, 0)))
    reached = _circular(from_left, _filter_of_length(h, 2 * half))
    reached = reached[:, :, half:]
    reached = jnp.where((right == across)[..., None], reached, 0)
    both = jnp.stack([jnp.zeros_like(reached), reached], axis=2)
    y = y + both.reshape(batch, size, channels)
    half *= 2
  return jnp.where(valid, y[:, :length], 0)


def _step(x, h, segment_ids):
  """Convolves the last token alone: x [B, L, C], h [L, C] -> [B, 1, C]."""
  runs = segments.run_numbers(segment_ids)
  seen = (
    (runs == runs[:, -1:]) & (segment_ids != 0) & (segment_ids[:, -1:] != 0)
  )
  x = jnp.where(seen[..., None], x, 0)
  return jnp.einsum('blc,lc->bc', x, h[::-1])[:, None]


def run(
  raw: jax.Array,
  h: jax.Array,
  *,
  expand: Callable[[jax.Array], jax.Array],
  segment_ids: jax.Array | None,
  cache: LongConvCache | None,
) -> tuple[jax.Array, LongConvCache | None]:
  """Convolves expand(raw) with h, in whatever pieces it comes.

  Args:
    raw: [B, T, R]: what the cache keeps.
    h: float32 [L, C].
    expand: maps raw [B, ., R] token by token to what is convolved [B, ., C].
    segment_ids: int32 [B, T], 0 is padding; None: one document, which with a
      cache is the last one.
    cache: from `empty_cache` or an earlier call; None: the rows start here.

  Returns:
    float32 [B, T, C] and the new cache (None without one).
  """
  if cache is None:
    x = expand(raw).astype(jnp.float32)
    if segment_ids is None:
      return convolve(x, h), None
    return convolve_segments(x, h, segment_ids), None
  length = raw.shape[1]
  if segment_ids is None:
    nothing = jnp.zeros((raw.shape[0],), jnp.int32)
    last = segments.last_id(cache.segment_ids, nothing)
    segment_ids = segments.continued_ids(last, length)
  raw = jnp.concatenate([cache.inputs, raw.astype(cache.inputs.dtype)], axis=1)
  ids = jnp.concatenate([cache.segment_ids, segment_ids], axis=1)
  x = expand(raw).astype(jnp.float32)
  convolved = _step if length == 1 else convolve_segments
  y = convolved(x, h, ids)[:, -length:]
  return y, LongConvCache(raw[:, length:], ids[:, length:])


def empty_cache(
  batch: int, filter_length: int, features: int, dtype: str
) -> LongConvCache:
  """Returns the cache of rows that have seen no token."""
  past = (batch, filter_length - 1)
  return LongConvCache(
    jnp.zeros((*past, features), jnp.dtype(dtype)),
    jnp.zeros(past, jnp.int32),
  )
