"""Kernel: the inverse of every chunk, T = (I + A)^-1 beta, all in parallel.

A = strict_tril(beta (K K^T) . D), D_ij = exp(b_i - b_j) (see
`mosaic_gpu_layout`). Blocks on the diagonal are inverted from 1 token upwards:
with X the inverse of the blocks of s tokens, and A_s the part of A that joins
two of them into one of 2 s,

    X <- X - X A_s X,    s = 1, 2, 4, .. 32.

No power of A is formed: for nearly parallel keys and beta near 2 the powers
grow by orders of magnitude before they cancel. All products take pairs (see
`mosaic_gpu_utils`). X A_s is X A in the blocks of A_s, so A is stored once.

Until the last join all is 0 outside of the quarters of 32 tokens on the
diagonal. So X is kept as these two, one above the other, [C, 32]: a product
multiplies both by either quarter of the other factor, and of the two results
the rows are taken that belong together.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout

_C = layout.CHUNK
_HALF = _C // 2


def _quarter(pair_s, rows, columns):
  """Returns a quarter of both matrices of a pair in shared memory."""
  columns = layout.block(columns, _HALF)
  starts = (rows * _HALF, _C + rows * _HALF)
  return [pair_s.at[pl.ds(start, _HALF), columns] for start in starts]


def _store(x, pair_s):
  """Stores x as a pair and returns it in registers."""
  parts = utils.split(x)
  pair_s[...] = jnp.concatenate(parts, axis=0)  # At once, for one barrier.
  plgpu.commit_smem()
  return parts


def _joining(difference, x, level):
  """Returns the elements of x in A_s, s = 2^level, and 0 elsewhere.

  There the numbers of row and column differ first in the bit of s; `difference`
  is their exclusive or. All of x lie below the diagonal.
  """
  return utils.cast(jnp.where(difference >> level == 1, x, 0.0))


def _by_quarter(is_second, first, second):
  """Returns the first half of the rows of `first`, the second of `second`."""
  return utils.cast(jnp.where(is_second, second, first))


def _times(parts, is_second, pair_s, quarters):
  """Returns the products of two quarters in registers with two in memory."""
  products = [
    utils.split_products(parts, _quarter(pair_s, *quarter))
    for quarter in quarters
  ]
  return _by_quarter(is_second, *utils.matmuls(*products))


def _invert(a, a_s, x_s):
  """Returns (I + a)^-1, float32 [C, C]; the pairs are scratch."""
  _store(a, a_s)
  row, column = utils.indices(_C, _HALF)
  is_second = row >= _HALF
  difference = (row & (_HALF - 1)) ^ column
  diagonal = _by_quarter(is_second, a[:, :_HALF], a[:, _HALF:])
  x = jnp.where(difference == 0, 1.0, 0.0) - _joining(difference, diagonal, 0)
  x = utils.cast(x)
  for level in range(1, _HALF.bit_length() - 1):
    x_parts = _store(x, x_s)
    z = _times(x_parts, is_second, a_s, ((0, 0), (1, 1)))
    z_parts = utils.split(_joining(difference, z, level))
    x -= _times(z_parts, is_second, x_s, ((0, 0), (1, 0)))
  x_parts = _store(x, x_s)
  # The second halves of these rows are of the quarter below the diagonal.
  z = utils.matmul(utils.split_products(x_parts, _quarter(a_s, 1, 0)))
  below = utils.split_products(utils.split(z), _quarter(x_s, 0, 0))
  joined = utils.matmul(below)
  # Were it negated, the assembler would let the products wait for one another.
  joined = utils.cast(jnp.where(is_second, joined, 0.0))
  upper = utils.cast(jnp.where(is_second, 0.0, x))
  lower = utils.cast(jnp.where(is_second, x, 0.0))
  return jnp.concatenate([upper - joined, lower], axis=1)


def _compute(k_s, rows_s, beta_s, sum_s, a_s, x_s, sizes):
  """Stores the pair T of a chunk in `a_s`; `x_s` is scratch."""
  gram = utils.matmul([(k_s, utils.transposed(k_s))])
  row, column = utils.indices(_C, _C)
  if sizes.gated:
    by_row = utils.load_rows(rows_s.at[layout.SUM])
    by_column = utils.load_columns(sum_s)
    a = gram * layout.decays(by_row, by_column, row > column)
  else:
    a = utils.cast(jnp.where(row > column, gram, 0.0))
  beta = utils.load_rows(rows_s.at[layout.BETA])
  a = a * utils.over_rows(beta, _C)
  x = _invert(a, a_s, x_s)
  _store(x * utils.over_columns(utils.load_columns(beta_s), _C), a_s)


def inverse(
  k, rows, sizes: layout.Sizes, *, groups: int, interpret=None
) -> jax.Array:
  """Returns the pairs T_hi, T_lo of all chunks.

  Args:
    k: keys [B, T, H K] bfloat16.
    rows: float32 [R N, 1 or 4, C].
    sizes: of the call.
    groups: warpgroups of a block of threads, each with a chunk of its own.
    interpret: None, or how to interpret the kernel.

  Returns:
    bfloat16 [R N, 2 C, C].
  """
  count = sizes.rows * sizes.chunks

  def kernel(k_g, rows_g, t_g, k_s, rows_s, beta_s, sum_s, a_s, x_s, full):
    group = lax.axis_index('warpgroup')
    index = lax.axis_index('block') * groups + group
    full = full.at[group]
    k_s, rows_s, beta_s, sum_s, a_s, x_s = (
      ref.at[group] for ref in (k_s, rows_s, beta_s, sum_s, a_s, x_s)
    )

    @pl.when(index < count)
    def _():
      at = layout.place(lax.div(index, jnp.int32(sizes.chunks)), sizes)
      tokens = layout.block(lax.rem(index, jnp.int32(sizes.chunks)), _C)
      keys = layout.block(at.key, sizes.K)
      plgpu.copy_gmem_to_smem(k_g.at[at.batch, tokens, keys], k_s, full)
      plgpu.copy_gmem_to_smem(rows_g.at[index], rows_s, full)
      plgpu.copy_gmem_to_smem(rows_g.at[index, layout.BETA], beta_s, full)
      if sizes.gated:
        plgpu.copy_gmem_to_smem(rows_g.at[index, layout.SUM], sum_s, full)
      plgpu.barrier_wait(full)
      _compute(k_s, rows_s, beta_s, sum_s, a_s, x_s, sizes)
      plgpu.copy_smem_to_gmem(a_s, t_g.at[index])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((count, 2 * _C, _C), jnp.bfloat16),
    scratch_types=[
      utils.shared(groups, _C, sizes.K),
      plgpu.SMEM((groups, sizes.lines, _C), jnp.float32),
      plgpu.SMEM((groups, _C), jnp.float32),
      plgpu.SMEM((groups, _C), jnp.float32),
      utils.shared(groups, 2 * _C, _C, tile=_HALF),
      utils.shared(groups, 2 * _C, _HALF, tile=_HALF),
      plgpu.Barrier(num_arrivals=4 if sizes.gated else 3, num_barriers=groups),
    ],
    grid=(-(-count // groups),),
    grid_names=('block',),
    num_threads=groups,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name='delta_rule_inverse',
  )(k, rows)
