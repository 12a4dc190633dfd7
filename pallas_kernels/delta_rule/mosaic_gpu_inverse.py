"""Kernel: the inverse of every chunk, T = (I + A)^-1 beta, all in parallel.

A = strict_tril(beta (K K^T) . D), D_ij = exp(b_i - b_j) (see
`mosaic_gpu_layout`). Blocks on the diagonal are inverted from 1 token upwards:
with X the inverse of the blocks of s tokens, and A_s the part of A that joins
two of them into one of 2 s,

    X <- X - X A_s X,    s = 1, 2, 4, .. 32.

No power of A is formed: for nearly parallel keys and beta near 2 the powers
grow by orders of magnitude before they cancel. All products take pairs (see
`mosaic_gpu_utils`). X A_s is X A in the blocks of A_s, so A is stored once.

Until blocks are S long, all is 0 outside of those on the diagonal. So X is kept
as these, one above the other, [C, S]: a product multiplies all by each block of
the other factor, and of the C / S results the rows are taken that belong
together. S is 16, then 32, and T is found as quarters. In shared memory A and
T, too, are their quarters: the pair of those on the diagonal over the pair of
the one below it, which are the lower rows of [C, 32] each, all in all
[4 C, 32].

The squares of the keys' norms are on the diagonal of K K^T. Where keys are to
be normalised, the norms are a second result, and beta is divided by the
squares.

It is a kernel of its own, or what blocks of threads do that are ahead of the
recurrence in its launch, see `mosaic_gpu_scan.Helpers`.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels import normalization
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout
from pallas_kernels.delta_rule import mosaic_gpu_scan as scan

_C = layout.CHUNK
_HALF = layout.HALF
_SMALL = 16


def _block(ref, number):
  """Returns the pair of a block on the diagonal, [S, S] of [2 C, S] or more."""
  size = ref.shape[1]
  start = number * size
  return [ref.at[pl.ds(at, size)] for at in (start, start + _C)]


def _below(ref):
  """Returns the pair of the quarter below the diagonal in shared memory."""
  start = 2 * _C + _HALF
  return [ref.at[pl.ds(at, _HALF)] for at in (start, start + _C)]


def _store(ref, *matrices):
  """Stores the pairs of matrices, one after the other, and returns them."""
  pairs = [utils.split(x) for x in matrices]
  parts = [part for pair in pairs for part in pair]
  ref[...] = jnp.concatenate(parts, axis=0)  # At once, for one barrier.
  plgpu.commit_smem()
  return pairs


def _own_rows(parts):
  """Returns the i-th S rows of the i-th of the parts [C, S]."""
  size = parts[0].shape[1]
  row, _ = utils.indices(_C, size)
  rows, *others = parts
  for number, part in enumerate(others, start=1):
    rows = jnp.where(row >= number * size, part, rows)
  return utils.cast(rows)


def _diagonal(a, size):
  """Returns the blocks on the diagonal of a, one above the other."""
  starts = range(0, _C, size)
  return _own_rows([a[:, start : start + size] for start in starts])


def _times(parts, pair_s):
  """Returns the products of blocks in registers with those in memory."""
  count = _C // pair_s.shape[1]
  products = (
    utils.split_products(parts, _block(pair_s, number))
    for number in range(count)
  )
  return _own_rows(utils.matmuls(*products))


def _differing(size):
  """Returns where row and column of blocks [C, S] differ, an exclusive or."""
  row, column = utils.indices(_C, size)
  return (row & (size - 1)) ^ column


def _joining(x, level):
  """Returns the elements of x in A_s, s = 2^level, and 0 elsewhere.

  There the numbers of row and column differ first in the bit of s. All of x lie
  below the diagonal.
  """
  is_joining = _differing(x.shape[1]) >> level == 1
  return utils.cast(jnp.where(is_joining, x, 0.0))


def _join(x, a_s, x_s, level):
  """Returns X - X A_s X, s = 2^level, for blocks [C, S]; `x_s` is scratch."""
  (x_pair,) = _store(x_s, x)
  z = _joining(_times(x_pair, a_s), level)
  return x - _times(utils.split(z), x_s)


def _widened(x):
  """Returns blocks [C, S] as those of 2 S, [C, 2 S], with zeros beside."""
  size = x.shape[1]
  row, _ = utils.indices(_C, size)
  is_second = row & size != 0
  halves = jnp.where(is_second, 0.0, x), jnp.where(is_second, x, 0.0)
  return utils.cast(jnp.concatenate(halves, axis=1))


def _invert(a, a_s, x_s, small_a_s, small_x_s):
  """Returns the quarters of (I + a)^-1, float32 [C, 32] each.

  These are those on the diagonal, one above the other, and the one below it,
  in the lower rows; the others mean nothing.

  Args:
    a: float32 [C, C].
    a_s: scratch for the quarters of `a`.
    x_s: scratch for a pair [C, 32].
    small_a_s: scratch for a pair [C, 16].
    small_x_s: the same.
  """
  quarters = _diagonal(a, _HALF)
  _store(a_s, quarters, a[:, :_HALF])
  small = _diagonal(a, _SMALL)
  _store(small_a_s, small)
  x = jnp.where(_differing(_SMALL) == 0, 1.0, 0.0) - _joining(small, 0)
  x = utils.cast(x)
  last = _SMALL.bit_length() - 1
  for level in range(1, last):
    x = _join(x, small_a_s, small_x_s, level)
  x = _join(_widened(x), a_s, x_s, last)
  (x_pair,) = _store(x_s, x)
  z = utils.matmul(utils.split_products(x_pair, _below(a_s)))
  below = utils.split_products(utils.split(z), _block(x_s, 0))
  return x, utils.negative(utils.matmul(below))


def _store_norms(gram, norms_s):
  """Stores the norms of the keys; returns their squares, by rows."""
  row, column = utils.indices(_C, _C)
  own = utils.cast(jnp.where(row == column, gram, 0.0))
  squares = own.sum(axis=1) + normalization.EPS
  norms_s[...] = jnp.sqrt(squares)
  plgpu.commit_smem()
  return squares


def _compute(s, sizes):
  """Stores the quarters of T of a chunk in `t`."""
  gram = utils.matmul([(s['k'], utils.transposed(s['k']))])
  row, column = utils.indices(_C, _C)
  if sizes.gated:
    by_row = utils.load_rows(s['rows'].at[layout.SUM])
    by_column = utils.load_columns(s['sums'])
    a = gram * layout.decays(by_row, by_column, row > column)
  else:
    a = utils.cast(jnp.where(row > column, gram, 0.0))
  beta = utils.load_rows(s['rows'].at[layout.BETA])
  if sizes.normalized:
    beta = beta / _store_norms(gram, s['norms'])
  a = a * utils.over_rows(beta, _C)
  quarters, below = _invert(a, s['t'], s['x'], s['small_a'], s['small_x'])

  def strengths(half):
    at = layout.block(half, _HALF)
    beta = utils.load_columns(s['beta'].at[at])
    if sizes.normalized:
      norms = utils.load_columns(s['norms'].at[at])
      beta = beta / (norms * norms)
    return utils.over_columns(beta, _C)

  first, second = strengths(0), strengths(1)
  _store(s['t'], quarters * _own_rows([first, second]), below * first)


def _copy_out(t_s, t_g):
  """Copies T without the rows that mean nothing."""
  plgpu.copy_smem_to_gmem(t_s.at[pl.ds(0, 2 * _C)], t_g.at[pl.ds(0, 2 * _C)])
  for part, ref in enumerate(_below(t_s)):
    start = 2 * _C + part * _HALF
    plgpu.copy_smem_to_gmem(ref, t_g.at[pl.ds(start, _HALF)])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _invert_chunk(refs, find, sizes):
  """What a warpgroup does for a chunk.

  Args:
    refs: arrays in device memory by name.
    find: returns (scratch by name, the chunk's index in R N, ..).
    sizes: of the call.
  """
  s, index, *_ = find()
  at = layout.place(lax.div(index, jnp.int32(sizes.chunks)), sizes)
  tokens = layout.block(lax.rem(index, jnp.int32(sizes.chunks)), _C)
  keys, rows, full = layout.block(at.key, sizes.K), refs['rows'], s['full']
  plgpu.copy_gmem_to_smem(refs['k'].at[at.batch, tokens, keys], s['k'], full)
  plgpu.copy_gmem_to_smem(rows.at[index], s['rows'], full)
  plgpu.copy_gmem_to_smem(rows.at[index, layout.BETA], s['beta'], full)
  if sizes.gated:
    plgpu.copy_gmem_to_smem(rows.at[index, layout.SUM], s['sums'], full)
  plgpu.barrier_wait(full)
  _compute(s, sizes)
  if sizes.normalized:
    plgpu.copy_smem_to_gmem(s['norms'], refs['key_norms'].at[index])
  _copy_out(s['t'], refs['inverse'].at[index])


def _scratch(sizes, tasks):
  """Returns the scratch by name, for a number of tasks at a time."""
  line = plgpu.SMEM((tasks, _C), jnp.float32)
  small = utils.shared(tasks, 2 * _C, _SMALL, tile=_SMALL)
  return {
    'k': utils.shared(tasks, _C, sizes.K),
    'rows': plgpu.SMEM((tasks, sizes.lines, _C), jnp.float32),
    'beta': line,
    'sums': line,
    'norms': line,
    't': utils.shared(tasks, 4 * _C, _HALF, tile=_HALF),
    'x': utils.shared(tasks, 2 * _C, _HALF, tile=_HALF),
    'small_a': small,
    'small_x': small,
    'full': plgpu.Barrier(
      num_arrivals=4 if sizes.gated else 3, num_barriers=tasks
    ),
  }


def _results(sizes):
  """Returns shapes and dtypes of the results by name."""
  count = sizes.rows * sizes.chunks
  shape = (count, 3 * _C, _HALF)
  results = {'inverse': jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
  if sizes.normalized:
    results['key_norms'] = layout.norms(sizes)
  return results


def helpers(rows, sizes: layout.Sizes) -> scan.Helpers:
  """Returns the kernel as `Helpers` of `mosaic_gpu_recurrence`.

  Args:
    rows: float32 [R N, 1 or 4, C].
    sizes: of the call.
  """
  return scan.Helpers(
    work=functools.partial(_invert_chunk, sizes=sizes),
    inputs={'rows': rows},
    results=_results(sizes),
    scratch=functools.partial(_scratch, sizes),
    ahead=True,
    workers=2,
    registers=240,
  )


def inverse(
  k, rows, sizes: layout.Sizes, *, groups: int, interpret=None
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the quarters of T of all chunks, and the norms of the keys.

  Args:
    k: keys [B, T, H K] bfloat16.
    rows: float32 [R N, 1 or 4, C].
    sizes: of the call.
    groups: warpgroups of a block of threads, each with a chunk of its own.
    interpret: None, or how to interpret the kernel.

  Returns:
    (`inverse` and `norms` of `mosaic_gpu_layout`), the latter None unless keys
    are to be normalised.
  """
  count = sizes.rows * sizes.chunks
  results = _results(sizes)

  def kernel(k_g, rows_g, *others):
    *results_g, scratch = others
    refs = dict(zip(results, results_g, strict=True))
    refs |= {'k': k_g, 'rows': rows_g}
    group = lax.axis_index('warpgroup')
    index = lax.axis_index('block') * groups + group
    own = {name: ref.at[group] for name, ref in scratch.items()}

    @pl.when(index < count)
    def _():
      _invert_chunk(refs, lambda: (own, index), sizes)

  found, *norms = plgpu.kernel(
    kernel,
    out_type=list(results.values()),
    scratch_types=[_scratch(sizes, groups)],
    grid=(-(-count // groups),),
    grid_names=('block',),
    num_threads=groups,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name='delta_rule_inverse',
  )(k, rows)
  return found, norms[0] if norms else None
