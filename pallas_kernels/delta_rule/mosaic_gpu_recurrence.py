"""Kernel: the recurrence over chunks, as `mosaic_gpu_scan` runs it.

With the state S that enters a chunk and the inverse T of
`mosaic_gpu_inverse`,

    X  = T beta (V - entry (K S))
    O  = scale (entry (Q S) + tril((Q K^T) . D) X)
    S <- keep S + K^T (exit X),

entry, exit, keep, D as in `pallas_kernels.decay`, 1 without decay. X, T and the
scores are taken as pairs of bfloat16: for nearly parallel keys the sums over X
cancel.

Without outputs it stores what the gradients need, the states that enter each
chunk and the pairs X.
"""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout
from pallas_kernels.delta_rule import mosaic_gpu_scan as scan

_C = layout.CHUNK
_W = utils.TILE


def _errors(read, v, rows, gated):
  """Returns beta (V - entry (K S)) of a block of columns, from K S."""
  if gated:
    read = read * utils.over_rows(utils.load_rows(rows.at[layout.ENTRY]), _W)
  beta = utils.load_rows(rows.at[layout.BETA])
  return (utils.load_tile(v) - read) * utils.over_rows(beta, _W)


def _scores(scores, use, work, sizes):
  """Returns the pair tril((Q K^T) . D) in registers, from Q K^T."""
  is_past = utils.load_tile(work['mask']) > 0
  if not sizes.gated:
    return utils.split(utils.cast(jnp.where(is_past, scores, 0.0)))
  by_row = utils.load_rows(use['rows'].at[layout.SUM])
  by_column = utils.load_columns(use['sums'])
  return utils.split(scores * layout.decays(by_row, by_column, is_past))


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


def _store(o, refs, work, here):
  """Stores the outputs of a block of columns."""
  out_s = work['o'].at[here.group]
  out_s[...] = o.astype(jnp.bfloat16)
  plgpu.commit_smem()
  target = refs['o'].at[here.batch, here.tokens, here.values]
  plgpu.copy_smem_to_gmem(out_s, target)


def _output_step(sizes):
  def step(state, use, refs, work, here):
    pair = work['x'].at[2 * here.group], work['x'].at[2 * here.group + 1]
    state_s, k, q = work['state'].at[here.group], use['k'], use['q']
    v, rows = use['v'].at[here.group], use['rows']
    read = utils.matmul([(k, state_s)])
    utils.store_split(_errors(read, v, rows, sizes.gated), pair)
    inverse = layout.pair(use['inverse'])
    x, scores = utils.matmuls(
      utils.split_products(inverse, pair), [(q, utils.transposed(k))]
    )
    utils.store_split(x, pair)
    scores = _scores(scores, use, work, sizes)
    within = utils.split_products(scores, pair)
    if not sizes.gated:
      start = jnp.zeros_like(x), [(q, state_s), *within]
      o, state = utils.accumulate(start, (state, _products(use, pair)))
      _store(o * sizes.scale, refs, work, here)
      return state
    before, o = utils.matmuls([(q, state_s)], within)
    entry = utils.load_rows(rows.at[layout.ENTRY])
    o = o + before * utils.over_rows(entry, _W)
    _store(o * sizes.scale, refs, work, here)
    # From shared memory: kept in registers till here, it would spill others.
    x = utils.load_tile(pair[0]) + utils.load_tile(pair[1])
    (state,) = utils.accumulate(_decayed(state, x, use, pair))
    return state

  return step


def _state_step(sizes):
  def step(state, use, refs, work, here):
    pair = work['x'].at[2 * here.group], work['x'].at[2 * here.group + 1]
    v, rows = use['v'].at[here.group], use['rows']
    read = utils.matmul([(use['k'], work['state'].at[here.group])])
    utils.store_split(_errors(read, v, rows, sizes.gated), pair)
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


def outputs(
  q, k, v, inverse, rows, first, sizes, *, config
) -> tuple[jax.Array, jax.Array]:
  """Returns (o [B, T, HV V] bfloat16, the last state [R, K, V] float32).

  Args:
    q: queries, see `mosaic_gpu_layout` for all but `first`.
    k: keys.
    v: values.
    inverse: pairs of all chunks.
    rows: strengths and decays.
    first: float32 [R, K, V], the state that enters.
    sizes: of the call.
    config: see `mosaic_gpu_scan.run`.
  """
  groups = scan.groups(sizes, config.processors)
  inputs = {'q': q, 'k': k, 'v': v, 'inverse': inverse, 'rows': rows}
  o, last = scan.run(
    scan.Scan(
      step=_output_step(sizes),
      inputs=inputs,
      mask=jnp.tri(_C),
      results={
        'o': jax.ShapeDtypeStruct(v.shape, jnp.bfloat16),
        'last': jax.ShapeDtypeStruct(first.shape, jnp.float32),
      },
      first=first,
      last='last',
      entering=None,
      work={
        'x': utils.shared(2 * groups, _C, _W),
        'o': utils.shared(groups, _C, _W),
      },
    ),
    sizes,
    config,
    'delta_rule_recurrence',
  )
  return o, last


def states(
  k, v, inverse, rows, first, sizes, *, config
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (the states that enter each chunk, X_high, X_low).

  The arguments are those of `outputs`. The states are bfloat16 [R N, K, V],
  the parts of X bfloat16 [B, T, HV V].
  """
  groups = scan.groups(sizes, config.processors)
  inputs = {'k': k, 'v': v, 'inverse': inverse, 'rows': rows}
  entering = (sizes.rows * sizes.chunks, sizes.K, sizes.V)
  x = jax.ShapeDtypeStruct(v.shape, jnp.bfloat16)
  found = scan.run(
    scan.Scan(
      step=_state_step(sizes),
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
