"""Kernel: the gradients inside every chunk, all chunks in parallel.

With S the state that enters a chunk, M = -dS the gradient of the one that
leaves it, and the pair X and dV that the recurrences found,

    B  = strict_tril((dO X^T) . scale D)     b = scale diag(dO X^T)
    G  = strict_tril((dV X^T) . D)
    dQ = scale entry (dO S^T) + B K + b K
    dK = B^T Q + b Q - (G + G^T) K - entry (dV S^T) - exit (X M^T)
    dbeta = diag(dV X^T) / beta^2

(X = beta times the error that it corrects, dV = beta times the gradient of R.)
The diagonals carry no decay and are taken element by element. What the decays
need are two numbers per token,

    later = rowsum(scale entry Q (dO S^T) + Q (B K) - entry K (dV S^T)
                   - K (G K) - K (B^T Q) + K (G^T K))
    earlier = -exit rowsum(K (X M^T)),

and one per channel of K, whole = -rowsum(S M). Found are -dQ and -dK, whose
products then all have one sign, -B and G, and are added up where they began.

If q and k are to be normalised, dO and dV are divided by |q| and |k| first.
What is found are then the gradients as if these norms were constants; the rest
of them lies along Q and K, and follows from -rowsum(Q dQ) and -rowsum(K dK), of
which a block finds what its channels give.

A block of threads is one warpgroup and has 64 columns of K; those of one chunk
come one after the other, so that the second finds in the cache what both read.
Blocks of 64 columns of V come through shared memory in turn. Two such thread
blocks fit a processor: one computes while the other waits for its copies.

It can also be what two warpgroups of a block do that are behind the recurrence
in its launch, see `mosaic_gpu_helpers`. The third one copies there, without
decays to stages of their own for two blocks of V, so that the next task's first
one comes early.

Of dV the high part is enough here: what its low part adds is below the rounding
of the results, unless the sums over X cancel altogether.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_helpers as helpers_lib
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout

_C = layout.CHUNK
_W = utils.TILE
_OF_STATES = ('states', 'minus')
_OF_VALUES = ('do', 'dv', *_OF_STATES, 'x')
# Blocks of V that helpers have in shared memory at a time; one with decays.
_STAGES = 2
# Lines of the results per token; the last two are there with norms alone, which
# are in their places until the results are.
BETA_SQUARED, LATER, EARLIER = range(3)
OF_QUERY, OF_KEY = -2, -1


class Gradients(NamedTuple):
  """What the kernel returns.

  Lines are to be summed over the blocks of K, but for the first, dbeta beta^2,
  which all of them hold.
  """

  dq: jax.Array  # [B, T, HV K] bfloat16
  dk: jax.Array  # [B, T, HV K] bfloat16
  lines: jax.Array  # [R N, K / 64, 1, 3 or 5, C] float32
  whole: jax.Array | None  # [R N, K] float32


class _Sums(NamedTuple):
  """Products that are summed over the blocks of V, float32 [C, 64] each."""

  of_queries: jax.Array  # dO X^T
  of_values: jax.Array  # dV X^T
  reads: jax.Array  # dO S^T
  corrections: jax.Array  # dV S^T, without factors of tokens + X M^T
  writes: jax.Array | None  # X M^T


def _has_factors(sizes):
  """Returns whether tokens have factors: decays or norms."""
  return sizes.gated or sizes.normalized


def _products(s, sizes):
  """Returns the products of one block of V, in the order of `_Sums`."""
  x_t = layout.pair(s['x'])
  state, minus = (s[name] for name in _OF_STATES)
  corrections = [(s['dv'], state)]
  writes = utils.half_products(utils.transposed_pair(x_t), minus)
  apart = _has_factors(sizes)
  return [
    utils.half_products_of(s['do'], x_t),
    utils.half_products_of(s['dv'], x_t),
    [(s['do'], state)],
    *([corrections, writes] if apart else [corrections + writes]),
  ]


def _along(x, ref):
  """Returns the sum of x times a tile of shared memory, by rows."""
  return (utils.load_tile(ref) * x).sum(axis=1)


def _line(s, number):
  """Returns a line of the results but the first; the last are -2 and -1."""
  lines = s['lines']
  return lines.at[number % (lines.shape[0] + 1) - 1]


def _diagonal(s, sizes):
  """Returns the first line, in the place of one that is found later."""
  return _line(s, OF_KEY if sizes.normalized else LATER)


def _divided(x, line, s, sizes):
  """Returns x [C, 64] by the norms of a line, if these are to be applied."""
  if not sizes.normalized:
    return x
  return x * utils.over_rows(1 / utils.load_rows(_line(s, line)), _W)


def _through_states(sums: _Sums, s, sizes):
  """Returns what -dQ and -dK owe to S, without decay -dK also what to M.

  With decays `writes` and `earlier` are stored; registers are few.
  """
  reads = utils.negative(sums.reads) * sizes.scale
  reads = _divided(reads, OF_QUERY, s, sizes)
  corrections = _divided(sums.corrections, OF_KEY, s, sizes)
  if not sizes.gated:
    if sizes.normalized:
      corrections = corrections + sums.writes
    return reads, corrections
  rows = s['rows']
  exit_ = utils.over_rows(utils.load_rows(rows.at[layout.EXIT]), _W)
  writes = sums.writes * exit_
  s['writes'][...] = writes
  _line(s, EARLIER)[...] = -_along(writes, s['k'])
  entry = utils.over_rows(utils.load_rows(rows.at[layout.ENTRY]), _W)
  s['reads'][...] = reads * entry
  return s['reads'], corrections * entry


def _stage(s, n):
  """Returns scratch with the buffers of a block of V, or the last there are."""
  while f'x_{n}' not in s:
    n -= 1
  return s | {name: s[f'{name}_{n}'] for name in _OF_VALUES}


def _pairs(s):
  """Returns scratch for B and G, in the place of X, and of dO and dV."""
  s = _stage(s, _STAGES)
  return layout.pair(s['x']), (s['dv'], s['do'])


def _own(x, row, column):
  return utils.cast(jnp.where(row == column, x, 0.0)).sum(axis=1)


def _store_within(sums: _Sums, s, index, sizes):
  """Stores the pairs -B and G and the diagonal of dV X^T; returns -b."""
  row, column = utils.indices(_C, _C)
  if sizes.gated:
    # They differ from task to task, or they would stay in registers for all.
    row, column = row + index, column + index
    by_row = utils.load_rows(s['rows'].at[layout.SUM])
    by_column = utils.load_columns(s['sums'])
    decays = layout.decays(by_row, by_column, row > column)

  def strict(x):
    if sizes.gated:
      return x * decays
    return utils.cast(jnp.where(row > column, x, 0.0))

  b, g = _pairs(s)
  values = _divided(sums.of_values, OF_KEY, s, sizes)
  _diagonal(s, sizes)[...] = _own(values, row, column)
  utils.store_split(strict(values), g)
  scores = utils.negative(sums.of_queries) * sizes.scale
  scores = _divided(scores, OF_QUERY, s, sizes)
  own = _own(scores, row, column)
  utils.store_split(strict(scores), b)
  return own


def _add_within(dq, dk, s, sizes):
  """Returns -dQ and -dK with the products of B and G; stores `later`."""
  b, g = _pairs(s)
  q, k = s['q'], s['k']
  of_query = utils.half_products(b, k)
  of_key = utils.half_products(utils.transposed_pair(b), q)
  of_key += utils.half_products(utils.transposed_pair(g), k)
  corrected = utils.half_products(g, k)
  # The first line of the results is where others are to be.
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  if not sizes.gated:
    return utils.accumulate((dq, of_query), (dk, corrected + of_key))
  dq, dk = utils.accumulate((utils.load_tile(dq), of_query), (dk, corrected))
  later = _along(dq, q) + _along(dk, k)
  written = utils.matmul(of_key)
  _line(s, LATER)[...] = _along(written, k) - later
  return dq, dk + written + utils.load_tile(s['writes'])


def _add_whole(s, n):
  """Adds to `whole` what a block of V gives."""
  state, minus = (
    utils.load_transposed(s[name]).astype(jnp.float32) for name in _OF_STATES
  )
  part = (state * minus).sum(axis=1)
  s['whole'][...] = utils.load_rows(s['whole']) - part if n else -part


class _Place(NamedTuple):
  """Where a block of threads is."""

  index: object  # of the chunk in R N
  batch: object
  tokens: object  # slice of T
  block: object  # of 64 columns of K
  read: object  # slice of H K, its columns of q and k
  write: object  # slice of HV K, its columns of dq and dk
  value: object  # value head


def _place(index, block, sizes):
  at = layout.place(lax.div(index, jnp.int32(sizes.chunks)), sizes)
  return _Place(
    index=index,
    batch=at.batch,
    tokens=layout.block(lax.rem(index, jnp.int32(sizes.chunks)), _C),
    block=block,
    read=pl.ds(at.key * sizes.K + block * _W, _W),
    write=pl.ds(at.value * sizes.K + block * _W, _W),
    value=at.value,
  )


def _copy_keys(refs, s, here, sizes):
  """Starts to copy what a task needs but blocks of V."""
  for name in ('q', 'k'):
    part = refs[name].at[here.batch, here.tokens, here.read]
    plgpu.copy_gmem_to_smem(part, s[name], s['ready'])
  if sizes.gated:
    plgpu.copy_gmem_to_smem(refs['rows'].at[here.index], s['rows'], s['ready'])
    part = refs['rows'].at[here.index, layout.SUM]
    plgpu.copy_gmem_to_smem(part, s['sums'], s['ready'])
  if sizes.normalized:
    for name, line in (('query_norms', OF_QUERY), ('key_norms', OF_KEY)):
      part = refs[name].at[here.index]
      plgpu.copy_gmem_to_smem(part, _line(s, line), s['ready'])


def _copy_values(refs, s, here, sizes, n):
  """Starts to copy a block of V."""
  full, s = s[f'full_{n}'], _stage(s, n)
  values = pl.ds(here.value * sizes.V + n * _W, _W)
  for name in ('do', 'dv'):
    part = refs[name].at[here.batch, here.tokens, values]
    plgpu.copy_gmem_to_smem(part, s[name], full)
  columns = layout.block(n)
  for name in _OF_STATES:
    part = refs[name].at[here.index, columns, layout.block(here.block)]
    plgpu.copy_gmem_to_smem(part, s[name], full)
  plgpu.copy_gmem_to_smem(refs['x'].at[here.index, n], s['x'], full)


def _over_values(find, copy, free, sizes):
  """Returns the sums over all blocks of V.

  `whole` is made of all of them but the last, which waits for registers.
  """
  sums = None
  for n in range(sizes.value_blocks):
    copy(n)
    s, *_ = find()
    plgpu.barrier_wait(s[f'full_{n}'])
    s = _stage(s, n)
    if sizes.gated and n < sizes.value_blocks - 1:
      _add_whole(s, n)
      s = _stage(find()[0], n)
    products = _products(s, sizes)
    if sums is None:
      sums = utils.matmuls(*products)
    else:
      sums = utils.accumulate(*zip(sums, products, strict=True))
    # What was read must be read before it is copied to or stored to again.
    plgpu.commit_smem()
    free(n)
  return _Sums(*sums, *([] if _has_factors(sizes) else [None]))


def _compute(refs, find, sizes, *, copy=lambda n: None, free=lambda n: None):
  """What a warpgroup does for a chunk and a block of K.

  Args:
    refs: arrays in device memory by name.
    find: returns (scratch by name, the chunk's index in R N, the block's). It
      may read them from shared memory, which frees their registers meanwhile.
    sizes: of the call.
    copy: called before a block of V is waited for, with its number.
    free: called after it has been read. The last stage holds B and G then.
  """
  sums = _over_values(find, copy, free, sizes)
  s, *_ = find()
  plgpu.barrier_wait(s['ready'])
  dq, dk = _through_states(sums, s, sizes)
  s, *at = find()
  own = utils.over_rows(_store_within(sums, s, at[0], sizes), _W)
  s, *at = find()
  part = refs['lines'].at[*at, BETA_SQUARED]
  plgpu.copy_smem_to_gmem(_diagonal(s, sizes), part)
  dq, dk = _add_within(dq, dk, s, sizes)
  s, *at = find()
  q, k = s['q'], s['k']
  dq, dk = dq + own * utils.load_tile(k), dk + own * utils.load_tile(q)
  if sizes.normalized:
    _line(s, OF_QUERY)[...] = _along(dq, q)
    _line(s, OF_KEY)[...] = _along(dk, k)
  for ref, value in ((q, dq), (k, dk)):
    ref[...] = utils.negative(value).astype(jnp.bfloat16)
  if sizes.gated:
    _add_whole(_stage(s, _STAGES), sizes.value_blocks - 1)
  plgpu.commit_smem()
  here = _place(*at, sizes)
  for name, ref in (('dq', q), ('dk', k)):
    part = refs[name].at[here.batch, here.tokens, here.write]
    plgpu.copy_smem_to_gmem(ref, part)
  if _has_factors(sizes):
    others = pl.ds(1, _lines(sizes) - 1)
    part = refs['lines'].at[here.index, here.block, others]
    plgpu.copy_smem_to_gmem(s['lines'], part)
  if sizes.gated:
    part = refs['whole'].at[here.index, layout.block(here.block)]
    plgpu.copy_smem_to_gmem(s['whole'], part)


def _lines(sizes):
  """Returns the lines of the results per token."""
  return (3 if sizes.gated else 1) + (2 if sizes.normalized else 0)


def _scratch(sizes, stages, *tasks):
  """Returns the scratch by name, for a number of tasks at a time if given."""
  copies = 2 + 2 * sizes.gated + 2 * sizes.normalized
  barrier = functools.partial(plgpu.Barrier, num_barriers=math.prod(tasks))
  scratch = {name: utils.shared(*tasks, _C, _W) for name in ('q', 'k')}
  shapes = dict.fromkeys(_OF_VALUES, (_C, _W)) | {'x': (2 * _W, _C)}
  scratch |= {
    f'{name}_{n}': utils.shared(*tasks, *shape)
    for name, shape in shapes.items()
    for n in range(stages)
  }
  scratch['ready'] = barrier(num_arrivals=copies)
  for n in range(sizes.value_blocks):
    scratch[f'full_{n}'] = barrier(num_arrivals=len(_OF_VALUES))
  lines = (*tasks, max(_lines(sizes) - 1, 1), _C)
  scratch['lines'] = plgpu.SMEM(lines, jnp.float32)
  if sizes.gated:
    wide = utils.shared(*tasks, _C, _W, tile=_W // 2, dtype=jnp.float32)
    scratch |= {
      'rows': plgpu.SMEM((*tasks, sizes.lines, _C), jnp.float32),
      'sums': plgpu.SMEM((*tasks, _C), jnp.float32),
      'whole': plgpu.SMEM((*tasks, _W), jnp.float32),
      'reads': wide,
      'writes': wide,
    }
  return scratch


def _results(sizes):
  """Returns shapes and dtypes of the results by name."""
  count = sizes.rows * sizes.chunks
  keys = (sizes.B, sizes.T, sizes.HV * sizes.K)
  lines = (count, sizes.key_blocks, _lines(sizes), _C)
  results = {
    'dq': jax.ShapeDtypeStruct(keys, jnp.bfloat16),
    'dk': jax.ShapeDtypeStruct(keys, jnp.bfloat16),
    'lines': jax.ShapeDtypeStruct(lines, jnp.float32),
  }
  if sizes.gated:
    results['whole'] = jax.ShapeDtypeStruct((count, sizes.K), jnp.float32)
  return results


def _stages(sizes):
  """Returns how many blocks of V a helper has in shared memory at a time."""
  return 1 if sizes.gated else _STAGES


def _work(refs, find, sizes):
  """What a helper does for a task."""
  last = sizes.value_blocks - 1
  # B and G are in the last stage.
  kept = last if last >= _stages(sizes) - 1 else None

  def arrive(name):
    plgpu.barrier_arrive(find()[0][name])

  def free(n):
    if n != kept:
      arrive(f'free_{n}')
    if n == 0:
      # The results of the task before are where q and k are to be.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      arrive('free')

  if sizes.gated:
    # `whole` comes first, and the one of the task before may not be stored yet.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  _compute(refs, find, sizes, free=free)
  if kept is not None:
    arrive(f'free_{kept}')


def _fetch(refs, s, index, block, turn, sizes):
  """Copies what a helper needs for a task."""
  here, count = _place(index, block, sizes), sizes.value_blocks
  for n in range(count):
    before = n - _stages(sizes)  # What was in this stage, of this task if any.
    barrier = s[f'free_{before % count}']
    is_used = turn > 0 if before < 0 else True
    pl.when(is_used)(functools.partial(plgpu.barrier_wait, barrier))
    _copy_values(refs, s, here, sizes, n)
  plgpu.barrier_wait(s['free'])
  _copy_keys(refs, s, here, sizes)


def _drain(s, sizes):
  """Waits until all that was copied has been read."""
  count = sizes.value_blocks
  for n in range(max(0, count - _stages(sizes)), count):
    plgpu.barrier_wait(s[f'free_{n}'])


def _helpers_scratch(sizes, tasks):
  stages = range(sizes.value_blocks)
  names = ('free', *(f'free_{n}' for n in stages))
  barriers = dict.fromkeys(names, plgpu.Barrier(num_barriers=tasks))
  return _scratch(sizes, _stages(sizes), tasks) | barriers


def helpers(states, x, sizes: layout.Sizes) -> helpers_lib.Helpers:
  """Returns the kernel as `Helpers` of `mosaic_gpu_recurrence_bwd`.

  Args:
    states: entering each chunk.
    x: pairs X.
    sizes: of the call.
  """
  return helpers_lib.Helpers(
    work=functools.partial(_work, sizes=sizes),
    inputs={'states': states, 'x': x},
    results=_results(sizes),
    scratch=functools.partial(_helpers_scratch, sizes),
    fetch=functools.partial(_fetch, sizes=sizes),
    drain=functools.partial(_drain, sizes=sizes),
    parts=sizes.key_blocks,
    turns=4,
  )


def named_gradients(found) -> Gradients:
  """Returns what the kernel found, by name, as `Gradients`."""
  return Gradients(*(found.get(name) for name in Gradients._fields))


def gradients(
  q, k, do, rows, norms, states, x, minus, dv, sizes, *, interpret=None
) -> Gradients:
  """Returns the gradients of q and k, and what those of beta and g are made of.

  Args:
    q: queries, see `mosaic_gpu_layout` for all but the following.
    k: keys.
    do: gradient of the outputs.
    rows: strengths and decays.
    norms: those of keys and queries by name, empty if these stay as they are.
    states: entering each chunk.
    x: pairs X.
    minus: M of each chunk, like `states`.
    dv: bfloat16 [B, T, HV V].
    sizes: of the call.
    interpret: None, or how to interpret the kernel.
  """
  inputs = {'q': q, 'k': k, 'do': do, 'states': states, 'x': x}
  inputs |= {'minus': minus, 'dv': dv}
  inputs |= norms | ({'rows': rows} if sizes.gated else {})
  results = _results(sizes)
  names = [*inputs, *results]

  def kernel(*refs):
    *arrays, s = refs
    number = lax.axis_index('block')
    index = lax.div(number, jnp.int32(sizes.key_blocks))
    block = lax.rem(number, jnp.int32(sizes.key_blocks))
    refs = dict(zip(names, arrays, strict=True))
    here = _place(index, block, sizes)

    def copy(n):
      if n == 0:
        _copy_keys(refs, s, here, sizes)
      _copy_values(refs, s, here, sizes, n)

    _compute(refs, lambda: (s, index, block), sizes, copy=copy)
    plgpu.wait_smem_to_gmem(0)

  found = plgpu.kernel(
    kernel,
    out_type=list(results.values()),
    scratch_types=[_scratch(sizes, 1)],
    grid=(sizes.rows * sizes.chunks * sizes.key_blocks,),
    grid_names=('block',),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name='delta_rule_chunk_bwd',
  )(*inputs.values())
  return named_gradients(dict(zip(results, found, strict=True)))
