"""What the delta rule's Hopper kernels agree on: sizes, arrays, small helpers.

Symbols, used in all of them: C = 64 tokens of a chunk, N chunks of a row, R = B
HV rows times value heads, V and K cut into blocks of 64. Arrays:

    q, k      [B, T, H K] bfloat16     v, o, do  [B, T, HV V] bfloat16
    inverse   [R N, 3 C, C / 2] bfloat16, the quarters of T, see `quarter`
    rows      [R N, 1 or 4, C] float32: beta (, entry, exit, b)
    states    [R N, V, K] bfloat16, entering each chunk, transposed
    x         [R N, V / 64, 128, C] bfloat16, pairs X_hi^T over X_lo^T
    norms     [R N, C] float32: sqrt(sum(k^2) + 1e-6), and that of q

Normalised keys k / |k| are those of k with beta / |k|^2 and |k| v, and what a
normalised query reads is a |q|-th of what q does. So where `normalized` is set,
products take q and k as they are, X and dV are those of |k| v, and the norms
are factors of tokens, as decays are.

b_t = sum_{s <= t} g_s runs from the start of the chunk. A reset of the state is
a decay by exp(-128), which float32 rounds to 0. T is a multiple of 8, but need
not be one of C: what a copy reads behind an array is 0, what it writes there is
dropped, and beta is padded with zeros, so that nothing is written to the state.
"""

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels import normalization

CHUNK = 64
HALF = CHUNK // 2
BETA, ENTRY, EXIT, SUM = range(4)  # What a line of `rows` holds.


class Sizes(NamedTuple):
  """Sizes of a call; the axes are those of `api.delta_rule`."""

  B: int
  T: int
  H: int
  HV: int
  K: int
  V: int
  gated: bool
  scale: float
  normalized: bool = False

  @property
  def chunks(self) -> int:
    """Chunks of a row."""
    return -(-self.T // CHUNK)

  @property
  def rows(self) -> int:
    """Independent recurrences, B HV."""
    return self.B * self.HV

  @property
  def lines(self) -> int:
    """Lines of `rows`."""
    return 4 if self.gated else 1

  @property
  def key_blocks(self) -> int:
    """Blocks of 64 keys' channels."""
    return self.K // utils.TILE

  @property
  def value_blocks(self) -> int:
    """Blocks of 64 values' channels."""
    return self.V // utils.TILE


def states(sizes: Sizes) -> jax.ShapeDtypeStruct:
  """Returns what an array of states, one for each chunk, is."""
  shape = (sizes.rows * sizes.chunks, sizes.V, sizes.K)
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def transposed_pairs(sizes: Sizes) -> jax.ShapeDtypeStruct:
  """Returns what an array of pairs like `x` is."""
  shape = (sizes.rows * sizes.chunks, sizes.value_blocks, 2 * utils.TILE, CHUNK)
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def norms(sizes: Sizes) -> jax.ShapeDtypeStruct:
  """Returns what an array of norms is."""
  shape = (sizes.rows * sizes.chunks, CHUNK)
  return jax.ShapeDtypeStruct(shape, jnp.float32)


class Place(NamedTuple):
  """Where a recurrence is in q, k (`key`) and v, o (`value`)."""

  row: object  # of R
  batch: object
  key: object  # key head
  value: object  # value head


def place(row, sizes: Sizes) -> Place:
  """Returns the place of a recurrence, from its number in R."""
  value = lax.rem(row, jnp.int32(sizes.HV))
  group = jnp.int32(sizes.HV // sizes.H)
  batch = lax.div(row, jnp.int32(sizes.HV))
  return Place(row, batch, lax.div(value, group), value)


def decays(by_row, by_column, used):
  """Returns D_ij = exp(b_i - b_j), [C, C], 0 where it is not used.

  Args:
    by_row: b, loaded by rows.
    by_column: b, loaded by columns.
    used: bool [C, C], true only where i >= j, the exponent at most 0.
  """
  by_row = utils.over_rows(by_row, CHUNK)
  by_column = utils.over_columns(by_column, CHUNK)
  difference = by_row - by_column
  return jnp.exp(utils.cast(jnp.where(used, difference, -jnp.inf)))


def past(scores, use, sizes: Sizes):
  """Returns tril(scores . D) of a chunk, whose buffers are `use`."""
  row, column = utils.indices(CHUNK, CHUNK)
  is_past = row >= column
  if not sizes.gated:
    return utils.cast(jnp.where(is_past, scores, 0.0))
  by_row = utils.load_rows(use['rows'].at[SUM])
  by_column = utils.load_columns(use['sums'])
  return scores * decays(by_row, by_column, is_past)


def norm_of(x, blocks):
  """Returns the norms of queries or keys [C, K] by rows; K has `blocks`."""
  squares = normalization.EPS
  for number in range(blocks):
    part = utils.load_tile(x.at[:, block(number)])
    squares = squares + (part * part).sum(axis=1)
  return jnp.sqrt(squares)


def pair(ref):
  """Returns the halves of a [2 C, C] pair in shared memory."""
  return ref.at[pl.ds(0, CHUNK)], ref.at[pl.ds(CHUNK, CHUNK)]


def quarters(inverse):
  """Returns the pairs of T's quarters (0, 0), (1, 0), (1, 1), [C / 2, C / 2].

  There are in shared memory, one over the other, the pair of [C, C / 2], those
  on the diagonal, and that of the quarter below it; the one above it is 0.
  """
  starts = (0, CHUNK), (2 * CHUNK, 2 * CHUNK + HALF), (HALF, CHUNK + HALF)
  return tuple(
    tuple(inverse.at[pl.ds(start, HALF)] for start in pair_) for pair_ in starts
  )


def _halves(pair_):
  """Returns the pairs of the first and of the last tokens, [64, C / 2]."""
  return [x[:, :HALF] for x in pair_], [x[:, HALF:] for x in pair_]


def times_inverse(x, inverse) -> jax.Array:
  """Returns X T, float32 [64, C].

  Args:
    x: a pair [64, C] in registers.
    inverse: the `quarters` of T.
  """
  first, last = _halves(x)
  t00, t10, t11 = inverse
  parts = utils.matmuls(
    utils.split_products(last, t10) + utils.split_products(first, t00),
    utils.split_products(last, t11),
  )
  return jnp.concatenate(parts, axis=1)


def transposed_inverse_products(x, inverse):
  """Returns X T^T as two lists of products, the halves of its columns.

  The arguments are those of `times_inverse`.
  """
  first, last = _halves(x)
  t00, t10, t11 = (utils.transposed_pair(part) for part in inverse)
  return [
    utils.split_products(first, t00),
    utils.split_products(first, t10) + utils.split_products(last, t11),
  ]


def block(index, size=utils.TILE):
  """Returns the slice of a block of channels."""
  return pl.ds(index * size, size)
