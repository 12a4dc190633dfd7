"""Kernel: the inverse of every chunk, T = (I + A)^-1 beta, all in parallel.

A = strict_tril(beta (K K^T) . D), D_ij = exp(b_i - b_j) (see
`mosaic_gpu_layout`). Blocks on the diagonal are inverted from 1 token upwards:
with X the inverse of the blocks of s tokens, and A_s the part of A that joins
two of them into one of 2 s,

    X <- X - X A_s X,    s = 1, 2, 4, .. 32.

No power of A is formed: for nearly parallel keys and beta near 2 the powers
grow by orders of magnitude before they cancel. All products take pairs (see
`mosaic_gpu_utils`). X A_s is X A in the blocks of A_s, so A is stored once. The
products are of quarters of 32 tokens: until the last join all others are 0.
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
_HALVES = (0, 1)


def _columns(half):
  """Returns the slice of the columns of a half in registers."""
  return slice(half * _HALF, (half + 1) * _HALF)


def _block(pair_s, rows, columns):
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


def _times(parts, pair_s, *quarters):
  """Returns products of columns of a pair with quarters of one in memory."""
  return utils.matmuls(
    *(
      utils.split_products(
        [part[:, _columns(rows)] for part in parts],
        _block(pair_s, rows, columns),
      )
      for rows, columns in quarters
    )
  )


def _invert(a, difference, a_s, x_s):
  """Returns (I + a)^-1, float32 [C, C]; the pairs are scratch."""
  _store(a, a_s)
  x = jnp.where(difference == 0, 1.0, 0.0) - _joining(difference, a, 0)
  x = utils.cast(x)
  for level in range(1, _HALF.bit_length() - 1):
    # X is 0 outside of the quarters on the diagonal.
    x_parts = _store(x, x_s)
    z = jnp.concatenate(_times(x_parts, a_s, (0, 0), (1, 1)), axis=1)
    z_parts = utils.split(_joining(difference, z, level))
    x -= jnp.concatenate(_times(z_parts, x_s, (0, 0), (1, 1)), axis=1)
  x_parts = _store(x, x_s)
  # Z has columns of the first half alone, X_00 too.
  (z,) = _times(x_parts, a_s, (1, 0))
  (joined,) = _times(utils.split(z), x_s, (0, 0))
  first, second = (x[:, _columns(half)] for half in _HALVES)
  return jnp.concatenate([first - joined, second], axis=1)


def _compute(k_s, rows_s, beta_s, sum_s, a_s, x_s, sizes):
  """Stores the pair T of a chunk in `x_s`."""
  gram = utils.matmul([(k_s, utils.transposed(k_s))])
  beta = utils.load_rows(rows_s.at[layout.BETA])
  gram = gram * utils.over_rows(beta, _C)
  row, column = utils.indices(_C, _C)
  if sizes.gated:
    by_row = utils.load_rows(rows_s.at[layout.SUM])
    by_column = utils.load_columns(sum_s)
    a = gram * layout.decays(by_row, by_column, row > column)
  else:
    a = utils.cast(jnp.where(row > column, gram, 0.0))
  x = _invert(a, row ^ column, a_s, x_s)
  _store(x * utils.over_columns(utils.load_columns(beta_s), _C), x_s)


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
      plgpu.copy_smem_to_gmem(x_s, t_g.at[index])
      plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((count, 2 * _C, _C), jnp.bfloat16),
    scratch_types=[
      utils.shared(groups, _C, sizes.K),
      plgpu.SMEM((groups, sizes.lines, _C), jnp.float32),
      plgpu.SMEM((groups, _C), jnp.float32),
      plgpu.SMEM((groups, _C), jnp.float32),
      utils.shared(groups, 2 * _C, _C, tile=_HALF),
      utils.shared(groups, 2 * _C, _C, tile=_HALF),
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
