"""Kernel: the inverse of every chunk, T = (I + A)^-1, all chunks in parallel.

A = strict_tril(beta (K K^T) . D), D_ij = exp(b_i - b_j) (see
`mosaic_gpu_layout`). Blocks on the diagonal are inverted from 1 token upwards:
with X the inverse of the blocks of s tokens, and A_s the part of A that joins
two of them into one of 2 s,

    X <- X - X A_s X,    s = 1, 2, 4, .. 32.

No power of A is formed: for nearly parallel keys and beta near 2 the powers
grow by orders of magnitude before they cancel. All products take pairs (see
`mosaic_gpu_utils`). X A_s is X A in the blocks of A_s, so A is stored once.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout

_C = layout.CHUNK


def _joining(row, column, level):
  """Returns where A_s is, s = 2^level, among the elements below the diagonal.

  There the numbers of row and column differ first in the bit of s.
  """
  difference = row ^ column
  return (difference >= 1 << level) & (difference < 2 << level)


def _invert(a, a_pair, x_pair):
  """Returns (I + a)^-1, float32 [C, C]; the pairs are scratch."""
  row, column = utils.indices(_C, _C)
  x = jnp.where(row == column, 1.0, 0.0).astype(jnp.float32)
  x -= jnp.where(_joining(row, column, 0), a, 0.0)
  x = utils.cast(x)
  utils.store_split(a, a_pair)
  for level in range(1, _C.bit_length() - 1):
    x_parts = utils.store_split(x, x_pair)
    z = utils.matmul(utils.split_products(x_parts, a_pair))
    z = utils.cast(jnp.where(_joining(row, column, level), z, 0.0))
    x = x - utils.matmul(utils.split_products(utils.split(z), x_pair))
  return x


def _compute(k_s, rows_s, sum_s, a_s, x_s, sizes):
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
  a_pair, x_pair = layout.pair(a_s), layout.pair(x_s)
  utils.store_split(_invert(a, a_pair, x_pair), x_pair)


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

  def kernel(k_g, rows_g, t_g, k_s, rows_s, sum_s, a_s, x_s, full):
    group = lax.axis_index('warpgroup')
    index = lax.axis_index('block') * groups + group
    full = full.at[group]
    k_s, rows_s, sum_s, a_s, x_s = (
      ref.at[group] for ref in (k_s, rows_s, sum_s, a_s, x_s)
    )

    @pl.when(index < count)
    def _():
      at = layout.place(lax.div(index, jnp.int32(sizes.chunks)), sizes)
      tokens = layout.block(lax.rem(index, jnp.int32(sizes.chunks)), _C)
      keys = layout.block(at.key, sizes.K)
      plgpu.copy_gmem_to_smem(k_g.at[at.batch, tokens, keys], k_s, full)
      plgpu.copy_gmem_to_smem(rows_g.at[index], rows_s, full)
      if sizes.gated:
        plgpu.copy_gmem_to_smem(rows_g.at[index, layout.SUM], sum_s, full)
      plgpu.barrier_wait(full)
      _compute(k_s, rows_s, sum_s, a_s, x_s, sizes)
      plgpu.copy_smem_to_gmem(x_s, t_g.at[index])
      plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((count, 2 * _C, _C), jnp.bfloat16),
    scratch_types=[
      utils.shared(groups, _C, sizes.K),
      plgpu.SMEM((groups, sizes.lines, _C), jnp.float32),
      plgpu.SMEM((groups, _C), jnp.float32),
      utils.shared(groups, 2 * _C, _C),
      utils.shared(groups, 2 * _C, _C),
      plgpu.Barrier(num_arrivals=3 if sizes.gated else 2, num_barriers=groups),
    ],
    grid=(-(-count // groups),),
    grid_names=('block',),
    num_threads=groups,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name='delta_rule_inverse',
  )(k, rows)
