"""Kernel: the gradient of the state, over chunks from the last to the first.

With dS the gradient of the state that leaves a chunk and dO that of the
outputs,

    dX = exit (K dS) + B^T dO,  B = scale tril((Q K^T) . D)
    dV = T^T dX
    dS <- keep dS + Q^T (scale entry dO) - K^T (entry dV),

symbols as in `mosaic_gpu_recurrence`. What it keeps and stores is M = -dS, what
it finds first -dX: the products that are large then add up in the registers of
M. It stores M of every chunk and dV; the other gradients follow from these, all
chunks in parallel, see `mosaic_gpu_chunk_bwd`. If q and k are to be
normalised, dO is divided by |q|, and what is stored is |k| dV, the gradient of
the values.

Of the warpgroups of `mosaic_gpu_scan` those for states find dV and M, and leave
both. The one for results leaves for them what needs no state, -B and -scale
entry dO, and stores what was found.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout
from pallas_kernels.delta_rule import mosaic_gpu_scan as scan

_C = layout.CHUNK
_W = utils.TILE


def _minus_dx(block, number, minus):
  """Returns -dX^T, float32 [64, C]; leaves M."""
  part = minus.astype(jnp.bfloat16)
  block.leave(minus=part)
  block.wait_chunk(number)
  use = block.use(number)
  found = utils.matmul([(part, utils.transposed(use['k']))])
  if block.sizes.gated:
    exit_ = utils.load_columns(use['rows'].at[layout.EXIT])
    found = found * utils.over_columns(exit_, _W)
  block.wait('scores')
  scores = layout.pair(block.left('scores'))
  within = utils.half_products_of(utils.transposed(use['do']), scores)
  (found,) = utils.accumulate((found, within))
  block.free('scores')
  return found


def _leave_dv(block, number, dv):
  """Returns the pair to write to M, and what to do while it is written.

  That leaves dV, and commits, which orders loads before the next copy, too.
  """
  sizes, use = block.sizes, block.use(number)
  left = dv
  if sizes.normalized:
    norms = utils.load_columns(use['key_norms'])
    left = dv * utils.over_columns(norms, _W)
  written = utils.split(left)
  high = left.astype(jnp.bfloat16)

  def leave():
    block.leave(dv=high, turned=True)

  if sizes.normalized and block.groups > 1:
    leave()  # There are no registers for one pair more.
    leave = plgpu.commit_smem
  if sizes.gated:
    entry = utils.load_columns(use['rows'].at[layout.ENTRY])
    written = utils.split(dv * utils.over_columns(entry, _W))
  elif sizes.normalized:
    written = utils.split(dv)
  return written, leave


def _advance(block, number, minus):
  """Returns M^T, float32 [64, K], before a chunk."""
  dx = utils.split(_minus_dx(block, number, minus))
  use = block.use(number)
  dv = utils.negative(layout.times_inverse(dx, layout.quarters(use['inverse'])))
  written, meanwhile = _leave_dv(block, number, dv)
  if block.sizes.gated:
    minus = minus * use['rows'][layout.ENTRY, _C - 1]
  block.wait('reads')
  products = utils.half_products(written, use['k'])
  products.append((utils.transposed(block.left('reads')), use['q']))
  (minus,) = utils.accumulate((minus, products), meanwhile=meanwhile)
  block.free('reads')
  block.free_chunk(number)
  return minus


def _minus_scale(block, number):
  """Returns -scale, or -scale / |q| [C, 64]."""
  scale = -block.sizes.scale
  if not block.sizes.normalized:
    return scale
  norms = utils.load_rows(block.use(number)['query_norms'])
  return utils.over_rows(scale / norms, _W)


def _leave_scores(block, number):
  """Leaves the pair -B of a chunk, once that is there."""
  block.wait_chunk(number)
  sizes, use = block.sizes, block.use(number)
  scores = utils.matmul([(use['q'], utils.transposed(use['k']))])
  scores = layout.past(scores * _minus_scale(block, number), use, sizes)
  block.leave(scores=jnp.concatenate(utils.split(scores), axis=0))


def _leave_reads(block, number):
  """Leaves -scale entry dO of a chunk."""
  use = block.use(number)
  reads = utils.load_tile(use['do']) * _minus_scale(block, number)
  if block.sizes.gated:
    entry = utils.load_rows(use['rows'].at[layout.ENTRY])
    reads = reads * utils.over_rows(entry, _W)
  block.leave(reads=reads.astype(jnp.bfloat16))


def _store_minus(block, number):
  """Starts to store M of a chunk, if that is a result."""
  block.wait('minus')
  if 'minus' not in block.refs:
    return
  target = block.refs['minus'].at[block.index(number), block.columns]
  plgpu.copy_smem_to_gmem(block.left('minus'), target)


def _store_dv(block, number):
  """Starts to store dV of a chunk, if that is a result; M has been stored."""
  refs = block.refs
  _end_store(block, 'minus')
  block.wait('dv')
  if 'dv' not in refs:
    return
  target = refs['dv'].at[block.at.batch, block.tokens(number), block.values]
  plgpu.copy_smem_to_gmem(block.left('dv'), target)


def _end_store(block, name):
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  block.free(name)


def _finish(block, number):
  """Stores M and dV of a chunk, and leaves what needs no state of the next.

  In this order, as nobody waits for what is stored.
  """
  following = number + 1
  if_there = pl.when(number >= 0)
  if_followed = pl.when(following < block.sizes.chunks)

  def finish(part):
    if_there(lambda: _store_dv(part, number))
    if_followed(lambda: _leave_reads(part, following))
    if_there(lambda: _end_store(part, 'dv'))

  if_there(lambda: block.each(lambda part: _store_minus(part, number)))
  if_followed(lambda: _leave_scores(block, following))
  block.each(finish)
  if_followed(lambda: block.free_chunk(following))


def state_gradients(
  q,
  k,
  do,
  inverse,
  rows,
  norms,
  minus,
  sizes,
  *,
  config,
  keep=True,
  helpers=None,
) -> dict[str, jax.Array]:
  """Returns M of the states that leave each chunk, dV, and M of the first.

  Args:
    q: queries, see `mosaic_gpu_layout` for all but `minus`.
    k: keys.
    do: gradient of the outputs.
    inverse: pairs of all chunks.
    rows: strengths and decays.
    norms: those of keys and queries by name, empty if these stay as they are.
    minus: float32 [R, K, V], M of the final state.
    sizes: of the call.
    config: gives stages, processors and how to interpret the kernel.
    keep: return M of the chunks and dV, not `last` alone.
    helpers: None, or `Helpers` that read what is found.

  Returns:
    By name: `minus`, M of every chunk like `states`; `dv`, bfloat16
    [B, T, HV V]; `last`, M of the initial state, float32 [R, K, V]; and what
    helpers find.
  """
  inputs = {'q': q, 'k': k, 'do': do, 'inverse': inverse}
  inputs |= norms | ({'rows': rows} if sizes.gated else {})
  last = (sizes.rows, sizes.V, sizes.K)
  results = {'last': jax.ShapeDtypeStruct(last, jnp.float32)}
  name = 'delta_rule_part_bwd'
  if keep:
    results |= {
      'minus': layout.states(sizes),
      'dv': jax.ShapeDtypeStruct(do.shape, jnp.bfloat16),
    }
    name = 'delta_rule_recurrence_bwd'
  if helpers:
    name = 'delta_rule_recurrence_chunk_bwd'
  found = scan.run(
    scan.Scan(
      advance=_advance,
      finish=_finish,
      inputs=inputs,
      results=results,
      first=jnp.swapaxes(minus, 1, 2),
      states_leave={'minus': (_W, sizes.K), 'dv': (_C, _W)},
      results_leave={'scores': (2 * _C, _C), 'reads': (_C, _W)},
      common=('scores',),
      reverse=True,
      first_number=-1,
      stores=2,
    ),
    sizes,
    config,
    name,
    helpers,
  )
  return found | {'last': jnp.swapaxes(found['last'], 1, 2)}
