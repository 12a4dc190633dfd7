"""Kernel: the gradient of the state, over chunks from the last to the first.

With dS the gradient of the state that leaves a chunk and dO that of the
outputs,

    dX = exit (K dS) + scale tril((Q K^T) . D)^T dO
    dV = T^T dX
    dS <- keep dS + Q^T (scale entry dO) - K^T (entry dV),

symbols as in `mosaic_gpu_recurrence`. What it keeps and stores is M = -dS: the
products that are large then add up in the registers of M. It stores M of every
chunk and the pairs dV; the other gradients follow from these, all chunks in
parallel, see `mosaic_gpu_chunk_bwd`.
"""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout
from pallas_kernels.delta_rule import mosaic_gpu_scan as scan

_C = layout.CHUNK
_W = utils.TILE


def _scores(scores, use, work, sizes):
  """Returns the pair scale tril((Q K^T) . D)^T in registers, from K Q^T."""
  is_past = utils.load_tile(work['mask']) > 0
  scores = scores * sizes.scale
  if not sizes.gated:
    return utils.split(utils.cast(jnp.where(is_past, scores, 0.0)))
  by_row = utils.load_rows(use['rows'].at[layout.SUM])
  by_column = utils.load_columns(use['sums'])
  decays = layout.decays(by_row, by_column, is_past, transposed=True)
  return utils.split(scores * decays)


def _value_gradient(minus_s, use, do, pair, work, sizes):
  """Returns dV [C, 64] of a block of columns; `pair` is scratch."""
  k = use['k']
  scores = utils.matmul([(k, utils.transposed(use['q']))])
  scores = _scores(scores, use, work, sizes)
  within = utils.half_products(scores, do)
  if sizes.gated:
    exit_ = utils.load_rows(use['rows'].at[layout.EXIT])
    read = utils.matmul([(k, minus_s)]) * utils.over_rows(exit_, _W)
    (dx,) = utils.accumulate((-read, within))
  else:
    dx, read = utils.matmuls(within, [(k, minus_s)])
    dx = dx - read
  utils.store_split(dx, pair)
  inverse = utils.transposed_pair(layout.pair(use['inverse']))
  return utils.matmul(utils.split_products(inverse, pair))


def _store(dv, pair, refs, here):
  """Stores dV as the pair that the other kernel reads."""
  utils.store_split(dv, pair)
  for name, part in zip(('dv', 'dv_low'), pair, strict=True):
    target = refs[name].at[here.batch, here.tokens, here.values]
    plgpu.copy_smem_to_gmem(part, target)


def _step(sizes):
  def step(minus, use, refs, work, here):
    pair = work['x'].at[2 * here.group], work['x'].at[2 * here.group + 1]
    do, scaled = use['do'].at[here.group], work['scaled'].at[here.group]
    reads = utils.load_tile(do) * -sizes.scale
    if sizes.gated:
      entry = utils.load_rows(use['rows'].at[layout.ENTRY])
      reads = reads * utils.over_rows(entry, _W)
    scaled[...] = reads.astype(jnp.bfloat16)
    minus_s = work['state'].at[here.group]
    dv = _value_gradient(minus_s, use, do, pair, work, sizes)
    k, q = utils.transposed(use['k']), utils.transposed(use['q'])
    products = [(k, pair[1]), (k, pair[0]), (q, scaled)]
    if not sizes.gated:
      _store(dv, pair, refs, here)
      (minus,) = utils.accumulate((minus, products))
      return minus
    entry = utils.load_rows(use['rows'].at[layout.ENTRY])
    minus = minus * use['rows'][layout.ENTRY, _C - 1]
    utils.store_split(dv * utils.over_rows(entry, _W), pair)
    (minus,) = utils.accumulate((minus, products))
    _store(dv, pair, refs, here)
    return minus

  return step


def state_gradients(
  q, k, do, inverse, rows, minus, sizes, *, config
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns M of the states that leave each chunk, dV, and M of the first.

  Args:
    q: queries, see `mosaic_gpu_layout` for all but `minus`.
    k: keys.
    do: gradient of the outputs.
    inverse: pairs of all chunks.
    rows: strengths and decays.
    minus: float32 [R, K, V], M of the final state.
    sizes: of the call.
    config: see `mosaic_gpu_scan.run`.

  Returns:
    (M bfloat16 [R N, K, V], dV_high, dV_low bfloat16 [B, T, HV V], M of the
    initial state, float32 [R, K, V]).
  """
  groups = scan.groups(sizes, config.processors)
  inputs = {'q': q, 'k': k, 'do': do, 'inverse': inverse}
  inputs |= {'rows': rows} if sizes.gated else {}
  leaving = (sizes.rows * sizes.chunks, sizes.K, sizes.V)
  dv = jax.ShapeDtypeStruct(do.shape, jnp.bfloat16)
  found = scan.run(
    scan.Scan(
      step=_step(sizes),
      inputs=inputs,
      mask=jnp.tri(_C).T,
      results={
        'minus': jax.ShapeDtypeStruct(leaving, jnp.bfloat16),
        'dv': dv,
        'dv_low': dv,
        'last': jax.ShapeDtypeStruct(minus.shape, jnp.float32),
      },
      first=minus,
      last='last',
      entering='minus',
      work={
        'x': utils.shared(2 * groups, _C, _W),
        'scaled': utils.shared(groups, _C, _W),
      },
      reverse=True,
    ),
    sizes,
    config,
    'delta_rule_recurrence_bwd',
  )
  return tuple(found)
