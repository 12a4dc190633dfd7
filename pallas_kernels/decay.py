"""What passes from token to token inside a chunk: decays and resets.

A state decays at every token by exp(g_t) before the token writes to it, and is
reset where a segment starts. Within a chunk of C tokens, with t = 1 .. C,

    entry_t = exp(sum_{s <= t} g_s)       the entering state on its way to t,
    exit_t  = exp(sum_{s > t} g_s)        what t writes, on its way out,
    keep    = exp(sum_s g_s)              the entering state on its way out,
    D_ij    = exp(sum_{j < s <= i} g_s)   what j writes, on its way to i >= j,

each 0 where a segment starts in between. All sums run forward over what they
cover; none is a difference of longer sums, which would overflow or lose the
small decays beside the large ones (`pair_decay` may, in float64).

With g per channel, D differs by channel and the scores
A_ij = sum_k x_ik y_jk D_ijk are no product of matrices. They are taken on a
binary tree over the tokens: for neighbouring blocks of s tokens the decay
splits at the border between them into two factors of at most 1,

    A_ij = sum_k (x_ik exp(sum_{m <= s <= i} g_sk))
                 (y_jk exp(sum_{j < s < m} g_sk)),  m the first of i's block,

so nothing is clipped: a factor that underflows belongs to a product that does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunking

# A log-decay of which no part is left, in float64 either.
_CLOSED = -1e4


class Segments(NamedTuple):
  """How segments cut a chunk; None stands for one segment everywhere."""

  same: jax.Array  # [M, B, 1, C, C]: both tokens are in one segment
  entry: jax.Array  # [M, B, 1, C, 1]: the entering state reaches the token
  exit: jax.Array  # [M, B, 1, C, 1]: the token reaches the leaving state
  keep: jax.Array  # [M, B, 1, 1, 1]: the entering state passes through


class Passage(NamedTuple):
  """Factors of a chunk; None stands for 1."""

  entry: jax.Array | None  # [..., C, 1 or K]
  exit: jax.Array | None  # [..., C, 1 or K]
  keep: jax.Array | None  # [..., 1 or K, 1]


def count_resets(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (resets up to and with each token, token is not padding), [B, T].

  A token resets the state where its id differs from that of the last token
  before it that is not padding (id 0).
  """
  valid = segment_ids != 0
  position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]  # [1, T]
  last = jax.lax.cummax(jnp.where(valid, position, -1), axis=1)
  before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
  reset = valid & (before >= 0) & (previous_id != segment_ids)
  return jnp.cumsum(reset, axis=1, dtype=jnp.int32), valid


def previous_resets(resets: jax.Array) -> jax.Array:
  """Returns the count of resets before each token, [B, T]."""
  return jnp.pad(resets, ((0, 0), (1, 0)))[:, :-1]


def segments(resets, previous, chunks: int) -> Segments | None:
  """Returns the segments of a group from its counts [B, L], or None."""
  if resets is None:
    return None
  batch = resets.shape[0]
  counts, earlier = (
    jnp.moveaxis(x.reshape(batch, chunks, 1, -1), 1, 0)  # [M, B, 1, C]
    for x in (resets, previous)
  )
  first, last = earlier[..., :1], counts[..., -1:]
  return Segments(
    counts[..., :, None] == counts[..., None, :],
    (counts == first)[..., None],
    (counts == last)[..., None],
    (last == first)[..., None],
  )


def _masked(factor, mask, dtype):
  if mask is None:
    return factor
  return mask.astype(dtype) if factor is None else jnp.where(mask, factor, 0)


def _tri(x, k=0, dtype=None):
  """Returns ones at j <= i + k, C x C, of the rank of x [..., C, K]."""
  tri = jnp.tri(x.shape[-2], k=k, dtype=dtype or x.dtype)
  return jnp.expand_dims(tri, range(x.ndim - 2))


def passage(g: jax.Array | None, cut: Segments | None) -> Passage:
  """Returns the factors of each chunk; g is None or [..., C, 1 or K]."""
  entry = exit_ = keep = None
  if g is not None:
    lower = _tri(g)
    sums = lower @ g  # [..., C, 1 or K]
    rest = (1 - lower) @ g
    entry, exit_ = jnp.exp(sums), jnp.exp(rest)
    keep = jnp.exp(sums[..., -1, :, None])
  if cut is None:
    return Passage(entry, exit_, keep)
  dtype = jnp.float32 if g is None else g.dtype
  return Passage(
    _masked(entry, cut.entry, dtype),
    _masked(exit_, cut.exit, dtype),
    _masked(keep, cut.keep, dtype),
  )


def scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
  """Returns x times a factor of `Passage`."""
  return x if factor is None else x * factor


def _lower(length: int, k: int = 0):
  """Returns ones at j <= i + k, in float64."""
  return jnp.tri(length, k=k, dtype=jnp.float64)


def _pair_decay(g):
  """Returns D [..., C, C] of g [..., C, 1]; 1 above the diagonal."""
  later = _tri(g, k=-1)  # [s, j]: s > j
  return jnp.exp(_tri(g) @ (g * later))


@chunking.in_float64
def pair_decay(g):
  """Returns D [..., C, C] of g [..., C, 1]; 1 above the diagonal.

  It is made of differences of sums in float64, where they keep more digits than
  float32 has, and has no derivative; see `crossings`.
  """
  sums = _lower(g.shape[-2]) @ jnp.maximum(g, _CLOSED)  # [..., C, 1]
  return jnp.exp(jnp.minimum(sums - jnp.swapaxes(sums, -1, -2), 0))


def _crossings(x, stride):
  size = x.shape[-1]
  before = _lower(size, k=-1)
  rows = before[stride - 1 :: stride]  # [R, C]
  x = x * jnp.expand_dims(rows, range(x.ndim - 2))
  # From s to s + 1, what goes out of s is added, what comes into it ends.
  change = jnp.sum(x, axis=-2)
  change -= with_gaps(jnp.sum(x, axis=-1), stride)
  return before @ change[..., None]


def with_gaps(x: jax.Array, stride: int) -> jax.Array:
  """Returns x [..., N] as [..., N stride], each element after stride - 1 zeros.

  To add them by `.at[].add` would be a scatter, which XLA of jax 0.11.2 cannot
  partition.
  """
  gap = stride - 1
  padding = [(0, 0, 0)] * (x.ndim - 1) + [(gap, 0, gap)]
  return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)


def crossings(x: jax.Array, stride: int = 1) -> jax.Array:
  """Returns what crosses into each token: c_s = sum_{j < s <= i} x_ij.

  It is the gradient to g of a function of D, where x is D times that to D. The
  sums are differences of longer ones, in float64.

  Args:
    x: float32 or float64 [..., R, C]; row r stands at token i = (r + 1) stride
      of the chunk. Entries of j >= i are left out.
    stride: tokens per row.

  Returns:
    [..., C, 1].
  """
  return chunking.in_float64(functools.partial(_crossings, stride=stride))(x)


def _halves(x):
  """Splits neighbouring blocks [..., 2 N, S, K] into firsts and seconds."""
  return x[..., 0::2, :, :], x[..., 1::2, :, :]


def _tree_scores(x, y, g):
  """Returns the scores of decays per channel, 0 above the diagonal."""
  shape = jnp.broadcast_shapes(x.shape, y.shape, g.shape)
  size = shape[-2]
  padded = 1 << (size - 1).bit_length()
  # Few axes: XLA's CPU backend ends the process at products of eight.
  x, y, g = (
    jnp.broadcast_to(a, shape).reshape(-1, *shape[-2:]) for a in (x, y, g)
  )
  pad = ((0, 0), (0, padded - size), (0, 0))
  x, y, g = (jnp.pad(a, pad)[:, :, None] for a in (x, y, g))
  scores = jnp.sum(x * y, axis=-1, keepdims=True)  # [..., N, S, S], S = 1
  before, after = g, jnp.zeros_like(g)  # sums to a token, and behind it
  while scores.shape[-1] < padded:
    x_low, y_low = _halves(x)[1], _halves(y)[0]
    first, second = _halves(before)
    last, rest = _halves(after)
    corner = chunking.outer(x_low * jnp.exp(second), y_low * jnp.exp(last))
    top, bottom = _halves(scores)
    top = jnp.concatenate([top, jnp.zeros_like(top)], axis=-1)
    bottom = jnp.concatenate([corner, bottom], axis=-1)
    scores = jnp.concatenate([top, bottom], axis=-2)
    x, y = (jnp.concatenate(_halves(a), axis=-2) for a in (x, y))
    total = second[..., -1:, :]
    before = jnp.concatenate([first, second + first[..., -1:, :]], axis=-2)
    after = jnp.concatenate([last + total, rest], axis=-2)
  return scores[:, 0, :size, :size].reshape(*shape[:-1], size)


def scores(
  x: jax.Array,
  y: jax.Array,
  g: jax.Array | None,
  cut: Segments | None,
  *,
  strict: bool = False,
  stride: int = 1,
  pair: jax.Array | None = None,
  known: jax.Array | None = None,
) -> jax.Array:
  """Returns A_ij = sum_k x_ik y_jk D_ijk for j <= i (j < i), else 0.

  Args:
    x: rows [..., R, K]; row r stands at the token (r + 1) stride of the chunk.
    y: columns [..., C, K], C = R stride.
    g: log-decays, None, [..., C, 1] or [..., C, K] (stride 1 only).
    cut: the segments.
    strict: leave out the diagonal.
    stride: tokens per row.
    pair: `pair_decay` of g, where it has been computed.
    known: x y^T, where it has been computed (not with g per channel).

  Returns:
    [..., R, C].
  """
  mask = _tri(y, k=-1 if strict else 0, dtype=bool)
  if cut is not None:
    mask = mask & cut.same
  mask = mask[..., stride - 1 :: stride, :]
  if g is not None and g.shape[-1] > 1:
    found = _tree_scores(x, y, g)
  else:
    found = chunking.gram(x, known) if x is y else chunking.outer(x, y, known)
    if pair is None and g is not None:
      pair = _pair_decay(g)
    if pair is not None:
      found = found * pair[..., stride - 1 :: stride, :]
  return jnp.where(mask, found, 0)
