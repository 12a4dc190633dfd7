"""What goes ahead of the recurrence: T of a chunk, and its part of the outputs.

The outputs are affine in the state S that enters a chunk. With X = T (V - entry
(K S)) put into O = scale (entry (Q S) + tril((Q K^T) . D) X), they are

    P  = scale tril((Q K^T) . D) T
    Q' = scale entry Q - (P entry) K
    O  = Q' S + P V,

and all but S is known before the recurrence is there. A row of Q' is what the
chunk's transitions up to that token make of its query: where beta |k|^2 is at
most 2 it is no longer than that, whatever T is, and may be rounded as the query
was. P itself is a pair, for sums over it cancel. -P V, which needs no other
pair than Q' does, is in the place of O until that is found.

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


def _find_p(s, sizes):
  """Returns (-P, the factor of Q by rows)."""
  scale = _scale(s, sizes)
  scores = utils.matmul([(s['q'], utils.transposed(s['k']))])
  scores = utils.split(layout.past(scores, s, sizes))
  p = layout.times_inverse(scores, inverse_kernel.quarters(s))
  p = p * _over_rows(-scale, _C)
  if sizes.gated:
    scale = scale * utils.load_rows(s['rows'].at[layout.ENTRY])
  return p, scale


def _replace_queries(p, scale, s, sizes):
  """Puts Q' in the place of Q; returns the pair of -P that this takes."""
  if sizes.gated:
    p = p * utils.over_columns(utils.load_columns(s['entry']), _C)
  pair = utils.split(p)
  for number in range(sizes.key_blocks):
    part = layout.block(number)
    q, k = s['q'].at[:, part], s['k'].at[:, part]
    correction = utils.matmul(utils.half_products(pair, k))
    query = utils.load_tile(q) * _over_rows(scale, _W) + correction
    q[...] = query.astype(jnp.bfloat16)
  return pair


def _replace_values(p, pair, s, sizes):
  """Puts -P V in the place of V; the pair is that of `_replace_queries`."""
  if sizes.normalized:
    p = p * utils.over_columns(utils.load_columns(s['norms']), _C)
  if sizes.normalized or sizes.gated:
    pair = utils.split(p)
  for number in range(sizes.value_blocks):
    v = s['v'].at[:, layout.block(number)]
    v[...] = utils.matmul(utils.half_products(pair, v)).astype(jnp.bfloat16)


def _of_chunk(refs, index, sizes):
  """Returns the parts of q, and of v and o, of a chunk by name."""
  at = layout.place(lax.div(index, jnp.int32(sizes.chunks)), sizes)
  tokens = layout.block(lax.rem(index, jnp.int32(sizes.chunks)), _C)
  values = layout.block(at.value, sizes.V)
  parts = {'q': layout.block(at.key, sizes.K), 'v': values, 'o': values}
  return {n: refs[n].at[at.batch, tokens, part] for n, part in parts.items()}


def _prepare(refs, find, copy_next, sizes, interpreted):
  """What a warpgroup does for a chunk."""
  s, index, *_ = find()
  parts = _of_chunk(refs, index, sizes)
  for name in ('q', 'v'):
    plgpu.copy_gmem_to_smem(parts[name], s[name], s['there'])
  if sizes.gated:
    entry = refs['rows'].at[index, layout.ENTRY]
    plgpu.copy_gmem_to_smem(entry, s['entry'], s['there'])
  inverse_kernel.invert(refs, find, sizes, interpreted)
  s, *_ = find()
  plgpu.barrier_wait(s['there'])
  p, scale = _find_p(s, sizes)
  pair = _replace_queries(p, scale, s, sizes)
  plgpu.commit_smem()
  copy_next()
  s, index, *_ = find()
  _replace_values(p, pair, s, sizes)
  plgpu.commit_smem()
  s, index, *_ = find()
  plgpu.copy_smem_to_gmem(s['v'], _of_chunk(refs, index, sizes)['o'])
  plgpu.copy_smem_to_gmem(s['q'], refs['queries'].at[index])
  if sizes.normalized:
    norms = refs['query_norms'].at[index]
    plgpu.copy_smem_to_gmem(s['query_norms'], norms)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _scratch(sizes, tasks):
  """Returns the scratch by name, for a number of tasks at a time."""
  line = plgpu.SMEM((tasks, _C), jnp.float32)
  scratch = {
    'q': utils.shared(tasks, _C, sizes.K),
    'v': utils.shared(tasks, _C, sizes.V),
    'there': plgpu.Barrier(
      num_arrivals=3 if sizes.gated else 2, num_barriers=tasks
    ),
  }
  scratch |= {'entry': line} if sizes.gated else {}
  scratch |= {'query_norms': line} if sizes.normalized else {}
  return scratch | inverse_kernel.scratch(sizes, tasks)


def _results(sizes):
  """Returns shapes and dtypes of the results by name, without P V."""
  shape = (sizes.rows * sizes.chunks, _C, sizes.K)
  results = {'queries': jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
  results |= inverse_kernel.results(sizes)
  if sizes.normalized:
    results['query_norms'] = layout.norms(sizes)
  return results


def helpers(
  q, rows, sizes: layout.Sizes, *, keep: bool, interpret
) -> helpers_lib.Helpers:
  """Returns the kernel as `Helpers` of `mosaic_gpu_recurrence`.

  Args:
    q: queries, [B, T, H K] bfloat16.
    rows: float32 [R N, 1 or 4, C].
    sizes: of the call.
    keep: the recurrence stores more, and is slower. What is too far ahead of it
      has left the cache when it is read: three would be slower than two.
    interpret: None, or how to interpret the kernel.
  """
  # Three have 168 registers each, too few if tokens have factors.
  workers, registers = (3, 168)
  if keep or sizes.gated or sizes.normalized:
    workers, registers = (2, 240)
  return helpers_lib.Helpers(
    work=functools.partial(
      _prepare, sizes=sizes, interpreted=interpret is not None
    ),
    copy=functools.partial(inverse_kernel.copy_in, sizes=sizes),
    inputs={'q': q, 'rows': rows},
    results=_results(sizes),
    scratch=functools.partial(_scratch, sizes),
    ahead=True,
    workers=workers,
    registers=registers,
  )
