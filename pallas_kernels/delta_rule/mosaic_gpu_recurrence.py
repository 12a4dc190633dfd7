"""Kernels: the recurrence over chunks, for outputs, gradients or a last state.

With the state S that enters a chunk and the pair T of `mosaic_gpu_inverse`,

    X  = T (V - entry (K S))
    O  = scale (entry (Q S) + tril((Q K^T) . D) X)
    S <- keep S + K^T (exit X),

entry, exit, keep, D as in `pallas_kernels.decay`, 1 without decay. X, T and the
scores are taken as pairs of bfloat16: for nearly parallel keys the sums over X
cancel. If q and k are to be normalised, V stands for |k| V, and O is divided by
|q|, see `mosaic_gpu_layout`.

Of the warpgroups of `mosaic_gpu_scan` those for states find X and S, and leave
both; the one for results makes the outputs, or stores S and X, transposed as
they are, for the kernel of the gradients, or does both. Where only the state
that a part of a row ends in is wanted, it does neither.

With helpers of `mosaic_gpu_chunk_fwd` outputs are O = Q' S + P V, and Q', P V
are there. If S is to be stored it is left, and the warpgroup for results finds
Q' S. Otherwise that follows K S in those for states, which then need not leave
S, and leave O.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout
from pallas_kernels.delta_rule import mosaic_gpu_scan as scan

_C = layout.CHUNK
_W = utils.TILE


class States(NamedTuple):
  """What the gradients need of every chunk; see `mosaic_gpu_layout`."""

  states: jax.Array
  x: jax.Array


class Outputs(NamedTuple):
  """What the recurrence finds."""

  o: jax.Array  # [B, T, HV V] bfloat16
  last: jax.Array  # [R, K, V] float32, the state after the last chunk
  query_norms: jax.Array | None  # `norms` of `mosaic_gpu_layout`, if normalized
  kept: States | None  # if it is asked for


def _errors(block, number, read, values):
  """Returns (V - entry (K S))^T, float32 [64, C], of (K S)^T and V^T."""
  use = block.use(number)
  if block.sizes.gated:
    entry = utils.load_columns(use['rows'].at[layout.ENTRY])
    read = read * utils.over_columns(entry, _W)
  values = values.astype(jnp.float32)
  if block.sizes.normalized:
    norms = utils.load_columns(use['key_norms'])
    values = values * utils.over_columns(norms, _W)
  if block.value_blocks < block.sizes.value_blocks:
    values = values * jnp.where(block.has_values, 1.0, 0.0)
  return values - read


def _find_x(block, number, state):
  """Returns X and the outputs, transposed, float32 [64, C].

  The latter are None unless outputs are left, rather than S.
  """
  part = state.astype(jnp.bfloat16)
  if 'state' in block.work:
    block.leave(state=part)
  block.wait_chunk(number)
  use = block.use(number)
  inverse = layout.quarters(use['inverse'])
  load = functools.partial(utils.load_transposed, use['v'])
  read = [(part, utils.transposed(use['k']))]
  if 'outputs' not in block.work:
    errors = _errors(block, number, *utils.matmuls(read, meanwhile=load))
    products = layout.transposed_inverse_products(utils.split(errors), inverse)
    return jnp.concatenate(utils.matmuls(*products), axis=1), None

  def outputs():
    values = load()
    own = utils.load_transposed(use['o']).astype(jnp.float32)
    return own, [(part, utils.transposed(use['queries']))], values

  def find(read, values):
    errors = _errors(block, number, read, values)
    return layout.transposed_inverse_products(utils.split(errors), inverse)

  o, *x = utils.accumulate_behind(
    read, behind=outputs, use=find, shape=(_W, layout.HALF)
  )
  return jnp.concatenate(x, axis=1), o


def _advance(block, number, state):
  """Returns the transposed state, float32 [64, K], after a chunk."""
  x, o = _find_x(block, number, state)
  use = block.use(number)
  parts = written = utils.split(x)
  if block.sizes.gated:
    exit_ = utils.load_columns(use['rows'].at[layout.EXIT])
    written = utils.split(x * utils.over_columns(exit_, _W))
    state = state * use['rows'][layout.ENTRY, _C - 1]

  def leave():  # Commits, too, what orders the loads before the next copy.
    if 'x' in block.work:
      block.leave(x=jnp.concatenate(parts, axis=0))
    if o is not None:
      block.leave(outputs=o.astype(jnp.bfloat16), turned=True)

  products = utils.half_products(written, use['k'])
  (state,) = utils.accumulate((state, products), meanwhile=leave)
  block.free_chunk(number)
  return state


def _scores(use, sizes):
  """Returns the pair tril((Q K^T) . D) of a chunk in registers."""
  scores = utils.matmul([(use['q'], utils.transposed(use['k']))])
  return utils.split(layout.past(scores, use, sizes))


def _store_query_norms(block, number):
  """Returns the norms of the queries of a chunk; one block stores them."""
  norms = layout.norm_of(block.use(number)['q'], block.sizes.key_blocks)

  @pl.when(block.part == 0)
  def _():
    block.refs['query_norms'].at[block.index(number)][...] = norms

  return norms


def _start_to_keep(block, name, number):
  """Starts to store the state or X of a chunk, if that is a result."""
  if 'states' not in block.refs:
    return
  index = block.index(number)
  target = {
    'state': block.refs['states'].at[index, block.columns],
    'x': block.refs['x'].at[index, block.part],
  }[name]
  plgpu.copy_smem_to_gmem(block.left(name), target)


def _free_kept(block, name):
  """Says that what is kept of a chunk is stored and no longer read."""
  if 'states' in block.refs:
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  block.free(name)


def _store_outputs(block, number):
  """Stores the outputs of a chunk."""
  block.wait_chunk(number)
  use = block.use(number)
  scores = _scores(use, block.sizes)
  scale = block.sizes.scale
  if block.sizes.normalized:
    norms = _store_query_norms(block, number)
    scale = utils.over_rows(scale / norms, _W)
  block.each(lambda part: _store_columns(part, number, scores, scale))
  block.free_chunk(number)


def _store_columns(block, number, scores, scale):
  """Stores the outputs of a chunk in the columns of a block."""
  use = block.use(number)
  block.wait('state')
  _start_to_keep(block, 'state', number)
  o = utils.matmul([(use['q'], utils.transposed(block.left('state')))])
  _free_kept(block, 'state')
  if block.sizes.gated:
    entry = utils.load_rows(use['rows'].at[layout.ENTRY])
    o = o * utils.over_rows(entry, _W)
  block.wait('x')
  _start_to_keep(block, 'x', number)
  x = utils.transposed_pair(layout.pair(block.left('x')))
  (o,) = utils.accumulate((o, utils.split_products(scores, x)))
  _free_kept(block, 'x')
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  _start_to_store(block, number, o * scale)


def _outputs_of(block, number):
  """Returns the outputs of a chunk in device memory."""
  return block.refs['o'].at[block.at.batch, block.tokens(number), block.values]


def _start_to_store(block, number, o):
  """Starts to store outputs; those before them must have been read."""
  block.left('o')[...] = o.astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(block.left('o'), _outputs_of(block, number))


def _add_to_outputs(block, number):
  """Stores the outputs of a chunk, of which Q' and P V are there."""
  block.wait_chunk(number)
  use = block.use(number)
  queries = plgpu.load(use['queries'], layout=utils.LAYOUT)

  def add(block):
    block.wait('state')
    _start_to_keep(block, 'state', number)
    own = utils.load_tile(block.use(number)['o'])
    products = [(queries, utils.transposed(block.left('state')))]
    (o,) = utils.accumulate((own, products))
    _free_kept(block, 'state')
    block.wait('x')
    _start_to_keep(block, 'x', number)
    _start_to_store(block, number, o)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # X is read, not O.
    block.free('x')

  block.each(add)
  block.free_chunk(number)


def _store_left_outputs(block, number):
  """Stores the outputs of a chunk, which are left."""
  block.wait_chunk(number)
  block.free_chunk(number)

  def store(block):
    block.wait('outputs')
    outputs = block.left('outputs')
    plgpu.copy_smem_to_gmem(outputs, _outputs_of(block, number))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    block.free('outputs')

  block.each(store)


def _store_states(block, number):
  """Stores the states that enter a chunk, and X."""
  block.wait_chunk(number)
  block.free_chunk(number)

  def store(block):
    block.wait('state')
    _start_to_keep(block, 'state', number)
    block.wait('x')
    _start_to_keep(block, 'x', number)
    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
    block.free('state')
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    block.free('x')

  block.each(store)


def _store_nothing(block, number):
  """Frees what a chunk has."""
  block.wait_chunk(number)
  block.free_chunk(number)

  def free(block):
    for name in _leaves(block.sizes):
      block.wait(name)
      block.free(name)

  block.each(free)


def _inputs(sizes, rows, key_norms, **inputs):
  """Returns the inputs by name, with what else the recurrence needs."""
  inputs |= {'rows': rows} if sizes.gated else {}
  return inputs | ({'key_norms': key_norms} if sizes.normalized else {})


def _kept(sizes):
  """Returns the results of which `States` are made."""
  return {
    'states': layout.states(sizes),
    'x': layout.transposed_pairs(sizes),
  }


def _leaves(sizes):
  return {'state': (_W, sizes.K), 'x': (2 * _W, _C)}


def outputs(
  q,
  k,
  v,
  inverse,
  rows,
  key_norms,
  first,
  sizes,
  *,
  keep,
  config,
  helpers=None,
) -> tuple[Outputs, dict[str, jax.Array]]:
  """Returns the outputs, the last state, and more; and results of helpers.

  Args:
    q: queries, see `mosaic_gpu_layout` for all but `first`.
    k: keys.
    v: values.
    inverse: pairs of all chunks, or None if there are helpers.
    rows: strengths and decays.
    key_norms: None unless keys are to be normalised, or as `inverse`.
    first: float32 [R, K, V], the state that enters.
    sizes: of the call.
    keep: return what `states` does, too.
    config: gives stages, processors and how to interpret the kernel.
    helpers: None, or those of `mosaic_gpu_chunk_fwd`.
  """
  last = (sizes.rows, sizes.V, sizes.K)
  results = {
    'o': jax.ShapeDtypeStruct(v.shape, jnp.bfloat16),
    'last': jax.ShapeDtypeStruct(last, jnp.float32),
  }
  if sizes.normalized:
    results['query_norms'] = layout.norms(sizes)
  if keep:
    results |= _kept(sizes)
  name = 'delta_rule_recurrence'
  finish, leaves, work = _store_outputs, _leaves(sizes), {'o': (_C, _W)}
  inputs = {'q': q, 'k': k, 'v': v, 'inverse': inverse}
  if helpers:
    name = 'delta_rule_chunk_fwd_recurrence'
    inputs = {'k': k, 'v': v} | dict.fromkeys(('queries', 'o', 'inverse'))
    finish = _add_to_outputs
    if not keep:
      finish, leaves, work = _store_left_outputs, {'outputs': (_C, _W)}, {}
  found = scan.run(
    scan.Scan(
      advance=_advance,
      finish=finish,
      inputs=_inputs(sizes, rows, key_norms, **inputs),
      results=results,
      first=jnp.swapaxes(first, 1, 2),
      states_leave=leaves,
      work=work,
    ),
    sizes,
    config,
    f'{name}_saving' if keep else name,
    helpers,
  )
  found_here = Outputs(
    found['o'],
    jnp.swapaxes(found['last'], 1, 2),
    found.get('query_norms'),
    States(found['states'], found['x']) if keep else None,
  )
  return found_here, found


def states(k, v, inverse, rows, key_norms, first, sizes, *, config) -> States:
  """Returns the states that enter each chunk, and X.

  The arguments are those of `outputs`.
  """
  found = scan.run(
    scan.Scan(
      advance=_advance,
      finish=_store_states,
      inputs=_inputs(sizes, rows, key_norms, k=k, v=v, inverse=inverse),
      results=_kept(sizes),
      first=jnp.swapaxes(first, 1, 2),
      states_leave=_leaves(sizes),
    ),
    sizes,
    config,
    'delta_rule_states',
  )
  return States(found['states'], found['x'])


def part(k, v, inverse, rows, key_norms, first, sizes, *, config) -> jax.Array:
  """Returns what a part of a row does to a state, [E, M] [R, K, V + K].

  E is the state that it ends in, M takes the state that enters to that: the
  state it ends in from I, with V = 0. The arguments are those of `outputs`.
  """
  eye = jnp.eye(sizes.K, dtype=jnp.float32)
  eye = jnp.broadcast_to(eye, (sizes.rows, *eye.shape))
  first = jnp.concatenate([jnp.swapaxes(first, 1, 2), eye], axis=1)
  found = scan.run(
    scan.Scan(
      advance=_advance,
      finish=_store_nothing,
      inputs=_inputs(sizes, rows, key_norms, k=k, v=v, inverse=inverse),
      results={'last': jax.ShapeDtypeStruct(first.shape, jnp.float32)},
      first=first,
      states_leave=_leaves(sizes),
      value_dim=sizes.V,
    ),
    sizes._replace(V=sizes.V + sizes.K),
    config,
    'delta_rule_part',
  )
  return jnp.swapaxes(found['last'], 1, 2)
