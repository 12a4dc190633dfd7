"""What the Hopper kernels in Pallas Mosaic GPU share.

A warpgroup (128 threads) multiplies tiles of 64 rows: the left operand from
registers or shared memory, the right one from shared memory, the accumulator in
registers. Operands have 16 bits. Where 8 bits of mantissa are too few, a
float32 matrix X is taken as a pair X_hi + X_lo of bfloat16 matrices, and

    X Y ~ X_hi Y_lo + X_lo Y_hi + X_hi Y_hi,

which is off by about 2^-16.
"""

from collections.abc import Callable

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

TILE = 64  # Rows of a tile, and columns of a swizzled row of shared memory.
LAYOUT = plgpu.Layout.WGMMA


def shared(*shape: int, tile: int = TILE, dtype=jnp.bfloat16) -> plgpu.SMEM:
  """Returns scratch for operands, or for what is loaded and stored by tiles.

  Args:
    *shape: rows are a multiple of `tile` long.
    tile: columns that are swizzled together, 32 to 128 bytes of them: what is
      sliced must be a multiple of it.
    dtype: of the elements.
  """
  transforms = (
    plgpu.TilingTransform((8, tile)),
    plgpu.SwizzleTransform(tile * jnp.dtype(dtype).itemsize),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def cast(x: jax.Array) -> jax.Array:
  """Returns x in the layout of accumulators."""
  return plgpu.layout_cast(x, LAYOUT)


def transposed(ref):
  """Returns a matrix in shared memory seen with its axes swapped."""
  return ref.transpose((1, 0))


def _issue(accumulators, products) -> None:
  for accumulator, pairs in zip(accumulators, products, strict=True):
    for a, b in pairs:
      plgpu.wgmma(accumulator, a, b)


def _accumulators(products) -> list:
  """Returns scratch for sums of products."""
  first = [pairs[0] for pairs in products]
  shapes = [(a.shape[0], b.shape[1]) for a, b in first]
  return [plgpu.ACC(shape, jnp.float32) for shape in shapes]


def matmuls(
  *products, meanwhile: Callable[[], jax.Array] | None = None
) -> tuple[jax.Array, ...]:
  """Returns sums of products in float32, all started before the first is read.

  Args:
    *products: lists of (a, b): a [M, N] bfloat16 in registers or shared memory,
      b [N, J] in shared memory. A list gives the sum of its a b.
    meanwhile: what to do while the products are computed; its result is the
      last of those returned.
  """

  def run(*accumulators):
    _issue(accumulators, products)
    others = (meanwhile(),) if meanwhile else ()
    return (
      tuple(cast(accumulator[...]) for accumulator in accumulators) + others
    )

  return pl.run_scoped(run, *_accumulators(products))


def matmuls_in_turn(*products, use) -> list:
  """Returns what is made of sums of products, as they are found.

  Args:
    *products: lists as in `matmuls`; all are started before the first is read.
    use: what to make of each, (its sum) -> what to return.
  """

  def run(*accumulators):
    _issue(accumulators, products)
    found = []
    for number, ref in enumerate(accumulators):
      behind = sum(len(pairs) for pairs in products[number + 1 :])
      value = plgpu.wgmma_accumulator_load(ref, wait_n=behind)
      found.append(use[number](cast(value)))
    return found

  return pl.run_scoped(run, *_accumulators(products))


def accumulate_behind(
  pairs,
  *,
  behind: Callable[[], tuple],
  use: Callable[..., list],
  shape,
) -> tuple[jax.Array, ...]:
  """Returns a sum that follows a product, and products of what that is.

  Args:
    pairs: the product, as in `matmuls`.
    behind: () -> (start, list of products, others): the sum, as in
      `accumulate`. It is computed while the product is used.
    use: (what the product is, others) -> two lists of products.
    shape: of the latter.

  Returns:
    (the sum, the first product, the second).
  """

  def run(first):
    _issue([first], [pairs])
    start, following, others = behind()

    def follow(accumulators):
      own, *found = accumulators
      _issue([own], [following])
      product = plgpu.wgmma_accumulator_load(first, wait_n=len(following))
      _issue(found, use(cast(product), others))

    zeros = plgpu.ACC.init(cast(jnp.zeros(shape, jnp.float32)))
    return pl.run_state(follow)((plgpu.ACC.init(start), zeros, zeros))

  return pl.run_scoped(run, *_accumulators([pairs]))


def matmul(pairs) -> jax.Array:
  """Returns the sum of the products of one list; see `matmuls`."""
  (result,) = matmuls(pairs)
  return result


def accumulate(
  *sums, meanwhile: Callable[[], None] | None = None
) -> tuple[jax.Array, ...]:
  """Returns each `start` plus products, in the same registers.

  No operand may be a part of shared memory at a constant index: jax does not
  lower those inside `run_state`.

  Args:
    *sums: pairs (start, list of products as in `matmuls`).
    meanwhile: what to do while the products are computed.
  """

  def run(accumulators):
    _issue(accumulators, [pairs for _, pairs in sums])
    if meanwhile:
      meanwhile()

  starts = tuple(plgpu.ACC.init(start) for start, _ in sums)
  return pl.run_state(run)(starts)


def negative(x: jax.Array) -> jax.Array:
  """Returns -x, as a difference.

  For a product that is negated the assembler runs all products of the kernel
  one after the other.
  """
  return 0.0 - x


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns float32 x as a pair of bfloat16 matrices that sum to it.

  The first is cut off, not rounded, and in integers: a conversion whose result
  is used in float32 again is one of single numbers, at an eighth of the speed.
  """
  bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16))
  high = lax.bitcast_convert_type(bits, jnp.float32)
  return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def store_split(x: jax.Array, pair) -> tuple[jax.Array, jax.Array]:
  """Stores float32 x as a pair in shared memory, ready for a product.

  Returns:
    The pair in registers.
  """
  parts = split(x)
  for part, ref in zip(parts, pair, strict=True):
    ref[...] = part
  plgpu.commit_smem()
  return parts


def split_products(x, y):
  """Returns the operands of X Y for pairs X and Y.

  The first product is one of a high part: that is found first, and what is to
  be found of the low one then hides behind the product.
  """
  return [(x[0], y[1]), (x[1], y[0]), (x[0], y[0])]


def half_products(x, y):
  """Returns the operands of X Y for a pair X and a bfloat16 matrix Y."""
  return [(x[0], y), (x[1], y)]


def half_products_of(x, y):
  """Returns the operands of X Y for a bfloat16 matrix X and a pair Y."""
  return [(x, y[1]), (x, y[0])]


def load_transposed(ref) -> jax.Array:
  """Returns the transpose of a bfloat16 tile of shared memory, in registers."""
  return plgpu.load(transposed(ref), layout=LAYOUT)


def transposed_pair(pair):
  """Returns a pair in shared memory seen with its axes swapped."""
  return transposed(pair[0]), transposed(pair[1])


def indices(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
  """Returns the row and the column of every element, int32 [rows, columns]."""
  shape = (rows, columns)
  row, column = (
    plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT)
    for axis in (0, 1)
  )
  return row, column


def load_tile(ref) -> jax.Array:
  """Returns a tile of shared memory as float32 in registers."""
  return plgpu.load(ref, layout=LAYOUT).astype(jnp.float32)


def load_rows(ref) -> jax.Array:
  """Returns a vector of shared memory whose elements belong to rows."""
  return plgpu.load(ref, layout=LAYOUT.reduce(1))


def load_columns(ref) -> jax.Array:
  """Returns a vector of shared memory whose elements belong to columns."""
  return plgpu.load(ref, layout=LAYOUT.reduce(0))


def over_rows(vector: jax.Array, columns: int) -> jax.Array:
  """Returns `vector` [M] as [M, columns]."""
  return lax.broadcast_in_dim(vector, (vector.shape[0], columns), [0])


def over_columns(vector: jax.Array, rows: int) -> jax.Array:
  """Returns `vector` [N] as [rows, N]."""
  return lax.broadcast_in_dim(vector, (rows, vector.shape[0]), [1])
