"""What goes ahead of the recurrence: T of a chunk, and its part of the outputs.

The outputs are affine in the state S that enters a chunk. With X = T (V - entry
(K S)) put into O = scale (entry (Q S) + tril((Q K^T) . D) X), they are

    P  = scale tril((Q K^T) . D) T
    Q' = scale entry Q - (P entry) K
    O  = Q' S + P V,

and all but S is known before the recurrence is there. A row of Q' is what the
chunk's transitions up to that token make of its query: where beta |k|^2 is at
most 2 it is no longer than that, whatever T is, and may be rounded as the query
was. P itself is a pair, for sums over it cancel. P V is in the place of O until
that is found; -P is what both are made of.

It is what blocks of threads do that are ahead of the recurrence in its launch,
see `mosaic_gpu_helpers.Helpers`, with T of `mosaic_gpu_inverse` first: then the
outputs take a third of the products of the recurrence that they take otherwise.
Where no processor is idle that would be more work, not less.
"""

import functools

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_helpers as helpers_lib
from pallas_kernels.delta_rule import mosaic_gpu_inverse as inverse_kernel
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout

_C = layout.CHUNK
_W = utils.TILE


def _scale(s, sizes):
  """Returns the factor of the outputs by rows; stores norms of the queries."""
  if not sizes.normalized:
    return jnp.float32(sizes.scale)
  norms = layout.norm_of(s['q'], sizes.key_blocks)
  s['query_norms'][...] = norms
  return sizes.scale / norms


def _over_rows(x, columns):
  return x if x.ndim == 0 else utils.over_rows(x, columns)


def _find_p(scores, s, sizes):
  """Returns (-P, the factor of Q by rows) of Q K^T."""
  scale = _scale(s, sizes)
  s = s | {'sums': s['columns'].at[layout.SUM]} if sizes.gated else s
  scores = utils.split(layout.past(scores, s, sizes))
  p = layout.times_inverse(scores, inverse_kernel.quarters(s))
  p = p * _over_rows(-scale, _C)
  if sizes.gated:
    scale = scale * utils.load_rows(s['rows'].at[layout.ENTRY])
  return p, scale


def _replace(pair, operands, refs, make) -> None:
  """Puts what is made of -P times operands in the place of blocks of a chunk.

  Args:
    pair: -P.
    operands: blocks of 64 channels [C, 64] in shared memory.
    refs: where to put them.
    make: (ref, product) -> float32 [C, 64].
  """

  def put(ref, product):
    ref[...] = make(ref, product).astype(jnp.bfloat16)

  utils.matmuls_in_turn(
    *(utils.half_products(pair, operand) for operand in operands),
    use=[functools.partial(put, ref) for ref in refs],
  )


def _blocks(ref):
  """Returns the blocks of 64 channels of a chunk."""
  return [ref.at[:, layout.block(n)] for n in range(ref.shape[1] // _W)]


def _replace_queries(p, scale, s, sizes):
  """Puts Q' in the place of Q; returns the pair of -P that this takes."""
  if sizes.gated:
    entry = utils.load_columns(s['columns'].at[layout.ENTRY])
    p = p * utils.over_columns(entry, _C)
  pair = utils.split(p)

  def make(q, product):
    return utils.load_tile(q) * _over_rows(scale, _W) + product

  _replace(pair, _blocks(s['k']), _blocks(s['q']), make)
  return pair


def _replace_values(p, pair, s, sizes):
  """Puts P V in the place of V; the pair is that of `_replace_queries`."""
  if sizes.normalized:
    p = p * utils.over_columns(utils.load_columns(s['norms']), _C)
  if sizes.normalized or sizes.gated:
    pair = utils.split(p)
  values = _blocks(s['v'])
  _replace(pair, values, values, lambda _, product: utils.negative(product))


def _of_chunk(refs, index, sizes):
  """Returns the parts of q, and of v and o, of a chunk by name."""
  at = layout.place(lax.div(index, jnp.int32(sizes.chunks)), sizes)
  tokens = layout.block(lax.rem(index, jnp.int32(sizes.chunks)), _C)
  values = layout.block(at.value, sizes.V)
  parts = {'q': layout.block(at.key, sizes.K), 'v': values, 'o': values}
  return {n: refs[n].at[at.batch, tokens, part] for n, part in parts.items()}


def _copy_keys(refs, s, index, sizes):
  """Starts to copy all of a chunk but its values."""
  inverse_kernel.copy_in(refs, s, index, sizes)
  q = _of_chunk(refs, index, sizes)['q']
  plgpu.copy_gmem_to_smem(q, s['q'], s['full'])


def _copy_values(refs, s, index, sizes):
  """Starts to copy the values of a chunk."""
  v = _of_chunk(refs, index, sizes)['v']
  plgpu.copy_gmem_to_smem(v, s['v'], s['v_full'])


def _store(refs, s, index, sizes):
  """Starts to store what is found of a chunk, but for T."""
  plgpu.copy_smem_to_gmem(s['v'], _of_chunk(refs, index, sizes)['o'])
  plgpu.copy_smem_to_gmem(s['q'], refs['queries'].at[index])
  if sizes.normalized:
    norms = refs['query_norms'].at[index]
    plgpu.copy_smem_to_gmem(s['query_norms'], norms)


def _invert(refs, find, sizes, interpreted):
  """Finds and starts to store T of a chunk; returns Q K^T."""
  s, *_ = find()
  plgpu.barrier_wait(s['full'])

  def invert(gram):
    inverse_kernel.invert(gram, refs, find, sizes, interpreted)

  def scores():
    s, *_ = find()
    return [(s['q'], utils.transposed(s['k']))]

  grams = inverse_kernel.gram_products(s)
  _, found = utils.matmuls_in_turn(grams, scores(), use=[invert, lambda x: x])
  return found


def _prepare(refs, find, copy, sizes, interpreted):
  """What a warpgroup does for a chunk."""
  scores = _invert(refs, find, sizes, interpreted)
  copy()
  s, *_ = find()
  p, scale = _find_p(scores, s, sizes)
  s, *_ = find()
  pair = _replace_queries(p, scale, s, sizes)
  s, *_ = find()
  plgpu.barrier_wait(s['v_full'])
  _replace_values(p, pair, s, sizes)
  plgpu.commit_smem()


def _scratch(sizes, tasks):
  """Returns the scratch by name, for a number of tasks at a time."""
  return inverse_kernel.scratch(tasks) | {
    'v': utils.shared(tasks, _C, sizes.V),
    'v_full': plgpu.Barrier(num_barriers=tasks),
  }


def _twice(sizes, tasks):
  """Returns what is copied a task ahead, Q in whose place Q' is put, too."""
  scratch = inverse_kernel.copied(sizes, tasks, others=1)
  scratch['q'] = utils.shared(tasks, _C, sizes.K)
  if sizes.normalized:
    scratch['query_norms'] = plgpu.SMEM((tasks, _C), jnp.float32)
  return scratch


def _results(sizes):
  """Returns shapes and dtypes of the results by name, without P V."""
  shape = (sizes.rows * sizes.chunks, _C, sizes.K)
  results = {'queries': jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
  results |= inverse_kernel.results(sizes)
  if sizes.normalized:
    results['query_norms'] = layout.norms(sizes)
  return results


def helpers(q, rows, sizes: layout.Sizes, *, interpret) -> helpers_lib.Helpers:
  """Returns the kernel as `Helpers` of `mosaic_gpu_recurrence`.

  Args:
    q: queries, [B, T, H K] bfloat16.
    rows: float32 [R N, 1 or 4, C].
    sizes: of the call.
    interpret: None, or how to interpret the kernel.
  """
  return helpers_lib.Helpers(
    work=functools.partial(
      _prepare, sizes=sizes, interpreted=interpret is not None
    ),
    inputs={'q': q, 'rows': rows},
    results=_results(sizes),
    scratch=functools.partial(_scratch, sizes),
    twice=functools.partial(_twice, sizes),
    copy_next=functools.partial(_copy_keys, sizes=sizes),
    copy=functools.partial(_copy_values, sizes=sizes),
    store=functools.partial(_store, sizes=sizes),
  )
