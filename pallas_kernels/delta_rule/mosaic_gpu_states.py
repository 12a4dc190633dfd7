"""Kernel: the states that enter the chunks, and X, for the gradients.

The recurrence of `mosaic_gpu_recurrence` without its outputs, as
`mosaic_gpu_scan` runs it,

    X  = T (V - entry (K S))
    S <- keep S + K^T (exit X).
"""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout
from pallas_kernels.delta_rule import mosaic_gpu_scan as scan

_C = layout.CHUNK
_W = utils.TILE


def _errors(read, v, rows):
  """Returns V - entry (K S) of a block of columns, from K S; None is none."""
  if rows is not None:
    read = read * utils.over_rows(utils.load_rows(rows.at[layout.ENTRY]), _W)
  return utils.load_tile(v) - read


def _decayed(state, x, use, pair):
  """Returns (keep S, the products K^T (exit X)); exit X goes to `pair`."""
  # Before the store: it also orders these loads before the next copy in.
  state = state * use['rows'][layout.ENTRY, _C - 1]
  exit_ = utils.load_rows(use['rows'].at[layout.EXIT])
  utils.store_split(x * utils.over_rows(exit_, _W), pair)
  return state, _products(use, pair)


def _products(use, pair):
  k = utils.transposed(use['k'])
  return [(k, pair[1]), (k, pair[0])]


def _step(sizes):
  def step(state, use, refs, work, here):
    pair = work['x'].at[2 * here.group], work['x'].at[2 * here.group + 1]
    v = use['v'].at[here.group]
    read = utils.matmul([(use['k'], work['state'].at[here.group])])
    utils.store_split(_errors(read, v, use.get('rows')), pair)
    inverse = layout.pair(use['inverse'])
    x = utils.matmul(utils.split_products(inverse, pair))
    if sizes.gated:
      (state,) = utils.accumulate(_decayed(state, x, use, pair))
    utils.store_split(x, pair)
    for name, part in zip(('x_high', 'x_low'), pair, strict=True):
      target = refs[name].at[here.batch, here.tokens, here.values]
      plgpu.copy_smem_to_gmem(part, target)
    if not sizes.gated:
      (state,) = utils.accumulate((state, _products(use, pair)))
    return state

  return step


def states(
  k, v, inverse, rows, first, sizes, *, config
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (the states that enter each chunk, X_high, X_low).

  Args:
    k: keys, see `mosaic_gpu_layout` for all but `first`.
    v: values.
    inverse: pairs of all chunks.
    rows: strengths and decays.
    first: float32 [R, K, V], the state that enters.
    sizes: of the call.
    config: see `mosaic_gpu_scan.run`.

  Returns:
    The states, bfloat16 [R N, K, V], and the parts of X, bfloat16
    [B, T, HV V].
  """
  groups = scan.groups(sizes, config.processors)
  inputs = {'k': k, 'v': v, 'inverse': inverse}
  inputs |= {'rows': rows} if sizes.gated else {}
  entering = (sizes.rows * sizes.chunks, sizes.K, sizes.V)
  x = jax.ShapeDtypeStruct(v.shape, jnp.bfloat16)
  found = scan.run(
    scan.Scan(
      step=_step(sizes),
      inputs=inputs,
      mask=None,
      results={
        'states': jax.ShapeDtypeStruct(entering, jnp.bfloat16),
        'x_high': x,
        'x_low': x,
      },
      first=first,
      last=None,
      entering='states',
      work={'x': utils.shared(2 * groups, _C, _W)},
    ),
    sizes,
    config,
    'delta_rule_states',
  )
  return tuple(found)
