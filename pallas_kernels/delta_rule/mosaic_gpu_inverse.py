"""Kernel: the inverse of every chunk, T = (I + A)^-1 beta, all in parallel.

A = strict_tril(beta (K K^T) . D), D_ij = exp(b_i - b_j) (see
`mosaic_gpu_layout`). The four blocks of 16 tokens on the diagonal are inverted
in float32 by the threads that have them (`mosaic_gpu_triangular`). With X the
inverse of blocks of s tokens, and A_s the part of A that joins two of them into
one of 2 s,

    X <- X - X A_s X,    s = 16, 32,

by products of pairs (see `mosaic_gpu_utils`). No power of A is formed: for
nearly parallel keys and beta near 2 the powers grow by orders of magnitude
before they cancel.

Until blocks are S long, all is 0 outside of those on the diagonal. So X is kept
as these, one above the other, [C, S]: a product multiplies all by each block of
the other factor, and of the results the rows are taken that belong together. T
is found as quarters, and is in shared memory in the place of X, those on the
diagonal, [C, 32], and of A, the one below it, the lower rows of [C, 32].

The squares of the keys' norms are on the diagonal of K K^T. Where keys are to
be normalised, the norms are a second result, and beta is divided by the
squares.

It is a kernel of its own, or the first that `mosaic_gpu_chunk_fwd` does.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_triangular as triangular
from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels import normalization
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout

_C = layout.CHUNK
_HALF = layout.HALF
_SMALL = triangular.SIZE


def _block(ref, number):
  """Returns the pair of one of the blocks [S, S] of a pair [2 C, S]."""
  size = ref.shape[1]
  start = number * size
  return [ref.at[pl.ds(at, size)] for at in (start, start + _C)]


def _put(x, ref):
  """Stores the pair of x and returns it."""
  pair = utils.split(x)
  ref[...] = jnp.concatenate(pair, axis=0)  # At once, for one barrier.
  return pair


def _by_row(parts):
  """Returns the i-th C / n rows of the i-th of n parts [C, S]."""
  row, _ = utils.indices(_C, parts[0].shape[1])
  size = _C // len(parts)
  rows, *others = parts
  for number, part in enumerate(others, start=1):
    rows = jnp.where(row >= number * size, part, rows)
  return utils.cast(rows)


def _columns(a, size, *starts):
  """Returns S columns of a by rows, from another start for each part."""
  return _by_row([a[:, start : start + size] for start in starts])


def _times(pair, pair_s, *numbers):
  """Returns by rows what a pair times each of the blocks in memory is."""
  products = (
    utils.split_products(pair, _block(pair_s, number)) for number in numbers
  )
  return _by_row(utils.matmuls(*products))


def _invert(a, find, interpreted):
  """Returns (I + a)^-1, float32 [C, 32] each: its quarters.

  These are those on the diagonal, one above the other, and the one below it,
  in the lower rows; the others mean nothing.

  Args:
    a: float32 [C, C].
    find: of `invert`.
    interpreted: whether the kernel is.
  """
  s, *_ = find()
  _put(_columns(a, _SMALL, 0, _HALF), s['small_a'])
  _put(a[:, :_HALF], s['a'])
  small = _columns(a, _SMALL, *range(0, _C, _SMALL))
  small = triangular.inverse(small, interpreted=interpreted)
  s, *_ = find()
  small_pair = _put(small, s['small_x'])
  plgpu.commit_smem()
  z = _times(small_pair, s['small_a'], 1, 3)
  z = utils.negative(_times(utils.split(z), s['small_x'], 0, 2))
  row, _ = utils.indices(_C, _SMALL)
  is_lower = row & _SMALL != 0
  halves = jnp.where(is_lower, z, small), jnp.where(is_lower, small, 0.0)
  x = utils.cast(jnp.concatenate(halves, axis=1))
  s, *_ = find()
  pair = _put(x, s['x'])
  plgpu.commit_smem()
  z = _times(pair, s['a'], 1)
  return x, utils.negative(_times(utils.split(z), s['x'], 0))


def _store_norms(gram, norms_s):
  """Stores the norms of the keys; returns their squares, by rows."""
  row, column = utils.indices(_C, _C)
  own = utils.cast(jnp.where(row == column, gram, 0.0))
  squares = own.sum(axis=1) + normalization.EPS
  norms_s[...] = jnp.sqrt(squares)
  plgpu.commit_smem()
  return squares


def _compute(gram, find, sizes, interpreted):
  """Puts the quarters of T of a chunk in the place of X and of A."""
  s, *_ = find()
  row, column = utils.indices(_C, _C)
  if sizes.gated:
    by_row = utils.load_rows(s['rows'].at[layout.SUM])
    by_column = utils.load_columns(s['columns'].at[layout.SUM])
    a = gram * layout.decays(by_row, by_column, row > column)
  else:
    a = utils.cast(jnp.where(row > column, gram, 0.0))
  beta = utils.load_rows(s['rows'].at[layout.BETA])
  if sizes.normalized:
    beta = beta / _store_norms(gram, s['norms'])
  a = a * utils.over_rows(beta, _C)
  on_diagonal, below = _invert(a, find, interpreted)
  s, *_ = find()

  def strengths(half):
    at = layout.block(half, _HALF)
    beta = utils.load_columns(s['columns'].at[layout.BETA, at])
    if sizes.normalized:
      norms = utils.load_columns(s['norms'].at[at])
      beta = beta / (norms * norms)
    return utils.over_columns(beta, _C)

  first, second = strengths(0), strengths(1)
  _put(on_diagonal * _by_row([first, second]), s['x'])
  _put(below * first, s['a'])
  plgpu.commit_smem()


def quarters(s):
  """Returns the pairs of T's quarters in scratch, see `layout.quarters`."""
  return _block(s['x'], 0), _block(s['a'], 1), _block(s['x'], 1)


def copy_in(refs, s, index, sizes):
  """Starts to copy what is needed of a chunk.

  Args:
    refs: arrays in device memory by name.
    s: scratch by name.
    index: of the chunk in R N.
    sizes: of the call.
  """
  at = layout.place(lax.div(index, jnp.int32(sizes.chunks)), sizes)
  tokens = layout.block(lax.rem(index, jnp.int32(sizes.chunks)), _C)
  keys = refs['k'].at[at.batch, tokens, layout.block(at.key, sizes.K)]
  plgpu.copy_gmem_to_smem(keys, s['k'], s['full'])
  for name in ('rows', 'columns'):
    plgpu.copy_gmem_to_smem(refs['rows'].at[index], s[name], s['full'])


def gram_products(s):
  """Returns K K^T of a chunk, as in `utils.matmuls`."""
  return [(s['k'], utils.transposed(s['k']))]


def invert(gram, refs, find, sizes, interpreted):
  """Finds T of a chunk, and starts to store it.

  Args:
    gram: float32 [C, C], K K^T.
    refs: arrays in device memory by name.
    find: returns (scratch by name, to which `copy_in` has copied, the chunk's
      index in R N, ..); it may read them from shared memory.
    sizes: of the call.
    interpreted: whether the kernel is.
  """
  _compute(gram, find, sizes, interpreted)
  s, index, *_ = find()
  if sizes.normalized:
    plgpu.copy_smem_to_gmem(s['norms'], refs['key_norms'].at[index])
  t_g = refs['inverse'].at[index]
  plgpu.copy_smem_to_gmem(s['x'], t_g.at[pl.ds(0, 2 * _C)])
  for part, ref in enumerate(_block(s['a'], 1)):  # Other rows mean nothing.
    start = 2 * _C + part * _HALF
    plgpu.copy_smem_to_gmem(ref, t_g.at[pl.ds(start, _HALF)])


def copied(sizes, tasks, others=0):
  """Returns the scratch that `copy_in` fills by name, for a number of tasks.

  Args:
    sizes: of the call.
    tasks: how many.
    others: copies beside these that its barrier waits for.
  """
  lines = plgpu.SMEM((tasks, sizes.lines, _C), jnp.float32)
  return {
    'k': utils.shared(tasks, _C, sizes.K),
    'rows': lines,  # Whose elements belong to rows.
    'columns': lines,  # The same, whose elements belong to columns.
    'full': plgpu.Barrier(num_arrivals=3 + others, num_barriers=tasks),
  }


def scratch(tasks):
  """Returns other scratch by name, for a number of tasks at a time."""
  pair = utils.shared(tasks, 2 * _C, _HALF, tile=_HALF)
  small = utils.shared(tasks, 2 * _C, _SMALL, tile=_SMALL)
  return {
    'norms': plgpu.SMEM((tasks, _C), jnp.float32),
    'a': pair,
    'x': pair,
    'small_a': small,
    'small_x': small,
  }


def results(sizes):
  """Returns shapes and dtypes of the results by name."""
  count = sizes.rows * sizes.chunks
  shape = (count, 3 * _C, _HALF)
  found = {'inverse': jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
  if sizes.normalized:
    found['key_norms'] = layout.norms(sizes)
  return found


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
  named = results(sizes)

  def kernel(k_g, rows_g, *others):
    *results_g, scratch_s = others
    refs = dict(zip(named, results_g, strict=True))
    refs |= {'k': k_g, 'rows': rows_g}
    group = lax.axis_index('warpgroup')
    index = lax.axis_index('block') * groups + group
    own = {name: ref.at[group] for name, ref in scratch_s.items()}

    @pl.when(index < count)
    def _():
      copy_in(refs, own, index, sizes)
      plgpu.barrier_wait(own['full'])
      gram = utils.matmul(gram_products(own))
      invert(gram, refs, lambda: (own, index), sizes, interpret is not None)
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  found, *norms = plgpu.kernel(
    kernel,
    out_type=list(named.values()),
    scratch_types=[copied(sizes, groups) | scratch(groups)],
    grid=(-(-count // groups),),
    grid_names=('block',),
    num_threads=groups,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name='delta_rule_inverse',
  )(k, rows)
  return found, norms[0] if norms else None
