"""The delta rule as Hopper kernels in Pallas Mosaic GPU, with its own VJP.

Kernels, with chunks of 64 tokens (`mosaic_gpu_layout` has the symbols):

    forward   inverse            T of every chunk, in parallel
              recurrence         o and the final state, chunk after chunk
              recurrence_saving  if there will be a gradient: S, the states that
                                 enter the chunks, and X as well
    backward  recurrence_bwd     the gradients of the states, from the last
                                 chunk to the first, and dV
              chunk_bwd          the other gradients, all chunks in parallel
              states             S and X, before these, if they were not kept

    where devices share a row, before these
    forward   part               what a part of the row does to a state
    backward  part_bwd           its own part of the gradient of the first state

The gradient is that of the solve (I + A) X = R: no derivative of the inverse.
What the forward pass keeps are its inputs and, unless the `Config` says
otherwise, T, S and X.

Cost per token and value head at K = V = 128, without decay, in bytes of device
memory and in products of two 64 x 64 matrices per chunk, each of which is
2 * 64^2 = 8192 operations a token:

    kernel             reads                writes             bytes   products
    inverse            k 256                T 192                448        4.25
    recurrence         q k v 768, T 192     o 256               1216       30.5
    recurrence_saving  q k v 768, T 192     o S X 1280          2240       30.5
    recurrence_bwd     q k do 768, T 192    dS 512, dV 256      1728       28.5
    chunk_bwd          q k do 768,          dq dk 512           3072       48
                       S dS 1024,
                       X dV 768
    states             k v 512, T 192       S 512, X 512        1728       16.5
    part               k v 512, T 192                            704       33
    part_bwd           q k do 768, T 192                         960       28.5

so 1,664 bytes and 0.28 million operations forward, 2,688 bytes if there will be
a gradient, and 4,800 bytes and 0.63 million backward. To keep S and X takes
1,024 bytes of memory; without them it is 1,664 forward and 6,528 with 0.76
million backward. To read and write the op's arrays once takes 1,026 and 1,796
bytes, flash-linear-attention's kernels 5,124 and 12,038 (whose arrays are
counted likewise). Beside it beta, 4 bytes for the first and 8 for what the last
finds of its gradient. Decays add 12 bytes to what each of the first reads, 16
to the recurrences and states, and 40 to what chunk_bwd reads and writes; norms
add 4 to inverse and states, 8 to the recurrences and 24 to chunk_bwd.

Of a row that devices share, each runs over its part twice, the first time for
no more than the state that it ends in, in V + K columns, and the gradient of
the one that it starts from (see `sequence_parallel`).

In the recurrences two blocks of threads share a row, and read q, k and T twice,
the second time from the cache; if there are more of them than the GPU has
processors, one takes the whole row, with 2 products less (Q K^T). If there are
at most half as many, the rest of the GPU works beside them in the same launch,
`chunk_fwd_recurrence` and `recurrence_chunk_bwd`; what one has stored the other
mostly finds in the cache. Ahead of the recurrence go T and all that outputs
have but for one product with S (`mosaic_gpu_chunk_fwd`): 16.5 products, and
20.5 are left for the recurrence; T and that, 704 bytes, are written and read.
Outputs are then rounded once more, on the way; all else is the same bit by bit.
Behind the reverse recurrence follow the gradients within chunks, of the same
products and the same bits.

X, T and the matrices within a chunk are pairs of bfloat16
(`mosaic_gpu_utils`), which is a third to a half of the products: for nearly
parallel keys single ones leave errors of some per cent. So is dV where it goes
on to the next chunk. To store X and dV saves chunk_bwd the products that solve
for them, and most of its shared memory, so that copies of one block of threads
hide behind the products of another. S, X and M stay transposed, as they were
found.

The gradient of a decay is the sum of S . dS over a state. Where all keys of a
row are the same and beta is 1, what decays is erased at once, and the sum
cancels to some per cent of its terms. These have the precision of bfloat16, as
S, M and dV are stored: the error of dg is then below 2^-8 of the root of the
sum of their squares, but not below 2^-6 of dg, as it is for all other inputs
and gradients that are tested. `xla` keeps float32.

q and k are normalised within the kernels, by factors of tokens alone (see
`mosaic_gpu_layout`); XLA adds to dq and dk what lies along q and k.

Tokens behind the end are masked in the kernels; only where T is no multiple of
8 are the arrays copied, padded to the next one. The decays' sums, a few numbers
per token, are made and taken apart by XLA.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from pallas_kernels import chunking
from pallas_kernels import decay
from pallas_kernels import sequence_parallel
from pallas_kernels.delta_rule import mosaic_gpu_chunk_bwd as chunk_bwd
from pallas_kernels.delta_rule import mosaic_gpu_chunk_fwd as chunk_fwd
from pallas_kernels.delta_rule import mosaic_gpu_config as config_lib
from pallas_kernels.delta_rule import mosaic_gpu_inverse as inverse_kernel
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout
from pallas_kernels.delta_rule import mosaic_gpu_recurrence as recurrence
from pallas_kernels.delta_rule import mosaic_gpu_recurrence_bwd as backward
from pallas_kernels.delta_rule import mosaic_gpu_scan as scan

_C = layout.CHUNK
_ROWS = 8  # Copies to tiles want T to be a multiple of it.
_RESET = -128.0  # exp of it is 0 in float32, and sums of it are exact.
_LEAST_STRENGTH = 2.0**-32  # Its square divides; to the state it is nothing.
_LEAST_DECAY = -100.0  # exp of it is below the least normal float32.


class _Static(NamedTuple):
  """What is fixed at trace time."""

  sizes: layout.Sizes
  config: config_lib.Config


class _Inputs(NamedTuple):
  """What the op is differentiable in."""

  q: jax.Array  # [B, T, H, K]
  k: jax.Array  # [B, T, H, K]
  v: jax.Array  # [B, T, HV, V]
  beta: jax.Array  # [B, T, HV]
  g: jax.Array | None  # [B, T, HV]
  initial_state: jax.Array  # [B, HV, K, V]


class _Counts(NamedTuple):
  """Segments of a row, None without."""

  reset: jax.Array | None  # bool [B, T]: the state is reset before the token
  valid: jax.Array | None  # bool [B, T]: not padding


class _Shared(NamedTuple):
  """What the backward pass needs of a row that devices share."""

  exchange: sequence_parallel.Exchange
  transition: jax.Array  # [B, HV, K, K]


class _Residuals(NamedTuple):
  """What the backward pass needs."""

  inputs: _Inputs
  counts: _Counts
  inverse: jax.Array | None
  states: recurrence.States | None
  norms: dict[str, jax.Array]  # of keys and queries, if they are to be applied
  shared: _Shared | None


def unavailable() -> str | None:
  """Returns why this machine cannot run the kernels, or None."""
  for device in jax.devices():
    capability = getattr(device, 'compute_capability', '')
    if device.platform == 'gpu' and str(capability).startswith('9.'):
      return None
  return 'it needs a Hopper GPU (compute capability 9.0), and none is here'


def _check(q, v, g, chunk_size) -> None:
  """Raises NotImplementedError for what the kernels do not cover."""
  if q.dtype != jnp.bfloat16:
    raise NotImplementedError(
      'its products are of bfloat16, got '
      f"{q.dtype.name}; use implementation='xla'"
    )
  for name, size in (('K', q.shape[-1]), ('V', v.shape[-1])):
    if size not in (64, 128):
      raise NotImplementedError(
        f'{name} must be 64 or 128, got {size} (the state of a larger head '
        'does not fit the registers)'
      )
  if g is not None and g.ndim != 3:
    raise NotImplementedError('it has no decay per channel')
  if chunk_size not in (None, _C):
    raise NotImplementedError(f'its chunk_size is {_C}, got {chunk_size}')


def _lines(x: jax.Array, sizes: layout.Sizes) -> jax.Array:
  """Returns x [B, T, HV] as [R N, C] in float32, padded with zeros."""
  x = chunking.pad_time(x.astype(jnp.float32), sizes.chunks * _C)
  return jnp.moveaxis(x, 2, 1).reshape(-1, _C)


def _from_lines(x: jax.Array, sizes: layout.Sizes) -> jax.Array:
  """Undoes `_lines`."""
  x = x.reshape(sizes.B, sizes.HV, sizes.chunks * _C)
  return jnp.moveaxis(x, 1, 2)[:, : sizes.T]


def _where_valid(x: jax.Array, counts: _Counts) -> jax.Array:
  if counts.valid is None:
    return x
  return chunking.zero_where_not(x, counts.valid)


def _log_decays(g, counts: _Counts, sizes: layout.Sizes) -> jax.Array:
  """Returns the log-decays [B, T, HV] with resets among them."""
  if g is None:
    decays = jnp.zeros((sizes.B, sizes.T, sizes.HV), jnp.float32)
  else:
    decays = jnp.maximum(g.astype(jnp.float32), _LEAST_DECAY)
  decays = _where_valid(decays, counts)
  if counts.reset is not None:
    decays += jnp.where(counts.reset, _RESET, 0.0)[..., None]
  return decays


def _make(inputs: _Inputs, counts: _Counts, sizes: layout.Sizes) -> jax.Array:
  """Returns the strengths and decays of all chunks, [R N, 1 or 4, C]."""
  beta = inputs.beta.astype(jnp.float32)
  beta = jnp.where(jnp.abs(beta) < _LEAST_STRENGTH, _LEAST_STRENGTH, beta)
  beta = _lines(_where_valid(beta, counts), sizes)
  if not sizes.gated:
    return beta[:, None]
  g = _lines(_log_decays(inputs.g, counts, sizes), sizes)
  sums = jnp.cumsum(g, axis=1)
  behind = jax.lax.cumsum(g, axis=1, reverse=True)
  behind = jnp.pad(behind[:, 1:], ((0, 0), (0, 1)))
  return jnp.stack([beta, jnp.exp(sums), jnp.exp(behind), sums], axis=1)


def _flat(x: jax.Array) -> jax.Array:
  """Returns x [B, T, H, K] as [B, T, H K]."""
  return x.reshape(*x.shape[:2], -1)


def _states(x: jax.Array, sizes: layout.Sizes) -> jax.Array:
  """Returns states [B, HV, K, V] as [R, K, V]."""
  return x.reshape(sizes.rows, sizes.K, sizes.V)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _delta_rule(static: _Static, inputs: _Inputs, counts: _Counts, exchange):
  config = dataclasses.replace(static.config, save_states=False)
  return _forward(static._replace(config=config), inputs, counts, exchange)[0]


def _invert(static: _Static, inputs: _Inputs, rows: jax.Array):
  """Returns (T of all chunks, the norms of the keys or None)."""
  return inverse_kernel.inverse(
    _flat(inputs.k),
    rows,
    static.sizes,
    groups=static.config.inverse_groups,
    interpret=static.config.interpret,
  )


def _enter(
  static: _Static, inputs: _Inputs, inverse, rows, key_norms, exchange
):
  """Returns the state that enters a part of a row, and what is shared."""
  first = inputs.initial_state
  affine = recurrence.part(
    _flat(inputs.k),
    _flat(inputs.v),
    inverse,
    rows,
    key_norms,
    _states(first, static.sizes),
    static.sizes,
    config=static.config,
  )
  affine = affine.reshape(*first.shape[:3], -1)
  entering, transition = exchange.enter(affine)
  return first + entering, _Shared(exchange, transition)


def _forward(static: _Static, inputs: _Inputs, counts: _Counts, exchange):
  """Returns ((o, final_state), residuals)."""
  sizes, config = static
  inputs = chunking.first_order_only(inputs)
  named = {
    name: checkpoint_name(x, f'delta_rule_{name}')
    for name, x in inputs._asdict().items()
    if x is not None
  }
  inputs = inputs._replace(**named)
  rows = _make(inputs, counts, sizes)
  inverse = key_norms = helpers = shared = None
  if exchange is None and config_lib.helper_blocks(sizes, config):
    helpers = chunk_fwd.helpers(
      _flat(inputs.q),
      rows,
      sizes,
      interpret=config.interpret,
    )
  else:
    inverse, key_norms = _invert(static, inputs, rows)
  if exchange is not None:
    state, shared = _enter(static, inputs, inverse, rows, key_norms, exchange)
    inputs = inputs._replace(initial_state=state)
  found, others = recurrence.outputs(
    _flat(inputs.q),
    _flat(inputs.k),
    _flat(inputs.v),
    inverse,
    rows,
    key_norms,
    _states(inputs.initial_state, sizes),
    sizes,
    keep=config.save_states,
    config=config,
    helpers=helpers,
  )
  if helpers:
    inverse, key_norms = others['inverse'], others.get('key_norms')
  if config.save_inverse:
    inverse = checkpoint_name(inverse, 'delta_rule_chunk_inverse')
  o = _where_valid(found.o.reshape(inputs.v.shape), counts)
  last = found.last.reshape(inputs.initial_state.shape)
  norms = {}
  if sizes.normalized:
    norms = dict(zip(scan.NORMS, (key_norms, found.query_norms), strict=True))
  return (o, last), _Residuals(
    inputs,
    counts,
    inverse if config.save_inverse else None,
    checkpoint_name(found.kept, 'delta_rule_states'),
    checkpoint_name(norms, 'delta_rule_norms'),
    shared,
  )


def _leave(static: _Static, shared: _Shared, arrays, dlast):
  """Returns dlast with what the parts behind find.

  Args:
    static: of the call.
    shared: of the part.
    arrays: the first of `state_gradients`.
    dlast: [B, HV, K, V].
  """
  sizes, config = static
  minus = -_states(dlast, sizes)
  found = backward.state_gradients(
    *arrays, minus, sizes, config=config, keep=False
  )
  own = -found['last'].reshape(dlast.shape)
  return dlast + shared.exchange.leave(own, shared.transition)


def _run_backward(static: _Static, residuals: _Residuals, do, dlast):
  """Returns (rows, dV, the chunks' gradients, that of the state)."""
  sizes, config = static
  inputs, norms = residuals.inputs, residuals.norms
  rows = _make(inputs, residuals.counts, sizes)
  inverse = residuals.inverse
  if inverse is None:
    inverse, _ = _invert(static, inputs, rows)
  q, k, v, do = (_flat(x) for x in (inputs.q, inputs.k, inputs.v, do))
  arrays = q, k, do, inverse, rows, norms
  if residuals.shared is not None:
    dlast = _leave(static, residuals.shared, arrays, dlast)
  states = residuals.states
  if states is None:
    first = _states(inputs.initial_state, sizes)
    states = recurrence.states(
      k, v, inverse, rows, norms.get('key_norms'), first, sizes, config=config
    )
  helpers = None
  if config_lib.helper_blocks(sizes, config):
    helpers = chunk_bwd.helpers(*states, sizes)
  found = backward.state_gradients(
    *arrays,
    -_states(dlast, sizes),
    sizes,
    config=config,
    helpers=helpers,
  )
  if helpers:
    of_chunks = chunk_bwd.named_gradients(found)
  else:
    of_chunks = chunk_bwd.gradients(
      q,
      k,
      do,
      rows,
      norms,
      *states,
      found['minus'],
      found['dv'],
      sizes,
      interpret=config.interpret,
    )
  dfirst = -found['last'].reshape(inputs.initial_state.shape)
  return rows, found['dv'], of_chunks, dfirst


def _decay_gradient(rows: jax.Array, lines, found, sizes: layout.Sizes):
  """Returns dg [B, T, HV].

  The decay of token s is in entry_t and in D_tj, j < s, of the tokens t >= s,
  in exit_t of those before it, and in keep.
  """
  later = jax.lax.cumsum(lines[:, chunk_bwd.LATER], axis=1, reverse=True)
  earlier = jnp.cumsum(lines[:, chunk_bwd.EARLIER], axis=1)
  earlier = jnp.pad(earlier[:, :-1], ((0, 0), (1, 0)))
  whole = rows[:, layout.ENTRY, -1:] * jnp.sum(
    found.whole, axis=1, keepdims=True
  )
  return _from_lines(later + earlier + whole, sizes)


def _strength_gradient(rows, norms, found, counts, sizes: layout.Sizes):
  """Returns dbeta [B, T, HV]; beta is 0 only where its gradient is."""
  beta = rows[:, layout.BETA]
  squared = jnp.where(beta == 0, 1.0, jnp.square(beta))
  products = found.lines[:, 0, chunk_bwd.BETA_SQUARED]
  if sizes.normalized:
    products = products * jnp.square(norms['key_norms'])
  return _where_valid(_from_lines(products / squared, sizes), counts)


def _sum_group(dx: jax.Array, sizes: layout.Sizes) -> jax.Array:
  """Returns the sum of dx [B, T, HV, ..] over the value heads of a key head."""
  if sizes.H == sizes.HV:
    return dx
  dx = dx.reshape(sizes.B, sizes.T, sizes.H, -1, *dx.shape[3:])
  return jnp.sum(dx.astype(jnp.float32), axis=3)


def _key_gradient(dx, x, lines, norms, sizes: layout.Sizes) -> jax.Array:
  """Returns the gradient of q or k.

  With y = x / |x| it is dx = (dy - y (y . dy)) / |x|, and the kernel has found
  dy / |x|, and the parts that blocks of K have of -x . dy / |x|.

  Args:
    dx: of the kernel, [B, T, HV K].
    x: q or k, [B, T, H, K].
    lines: float32 [R N, K / 64, C].
    norms: of x, see `mosaic_gpu_layout`.
    sizes: of the call.
  """
  dx = _sum_group(dx.reshape(sizes.B, sizes.T, sizes.HV, sizes.K), sizes)
  if not sizes.normalized:
    return dx.astype(x.dtype)
  along = jnp.sum(lines, axis=1) / jnp.square(norms)
  along = _sum_group(_from_lines(along, sizes), sizes)
  found = dx.astype(jnp.float32) + x.astype(jnp.float32) * along[..., None]
  return found.astype(x.dtype)


def _backward(static: _Static, residuals: _Residuals, cotangents):
  """Returns the gradients of the inputs, and none of what else there is."""
  sizes = static.sizes
  residuals, cotangents = chunking.first_order_only((residuals, cotangents))
  inputs, counts = residuals.inputs, residuals.counts
  do, dlast = cotangents
  do = _where_valid(do, counts)
  rows, dv, found, dfirst = _run_backward(static, residuals, do, dlast)
  norms = residuals.norms
  dbeta = _strength_gradient(rows, norms, found, counts, sizes)
  dg = None
  if inputs.g is not None:
    lines = jnp.sum(found.lines, axis=1)
    dg = _decay_gradient(rows, lines, found, sizes)
    dg = _where_valid(dg, counts).astype(inputs.g.dtype)
  gradients = _Inputs(
    _key_gradient(
      found.dq,
      inputs.q,
      found.lines[:, :, chunk_bwd.OF_QUERY],
      norms.get('query_norms'),
      sizes,
    ),
    _key_gradient(
      found.dk,
      inputs.k,
      found.lines[:, :, chunk_bwd.OF_KEY],
      norms.get('key_norms'),
      sizes,
    ),
    dv.reshape(inputs.v.shape),
    dbeta.astype(inputs.beta.dtype),
    dg,
    dfirst,
  )
  return gradients, None, None


_delta_rule.defvjp(_forward, _backward)


def delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array | None = None,
  *,
  scale: float,
  initial_state: jax.Array,
  segment_ids: jax.Array | None = None,
  normalize_qk: bool = False,
  chunk_size: int | None = None,
  exchange: sequence_parallel.Exchange | None = None,
  config: config_lib.Config | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Runs the kernels; see `api.delta_rule` and the module's docstring.

  Args:
    q: queries [B, T, H, K] bfloat16, K 64 or 128.
    k: keys [B, T, H, K].
    v: values [B, T, HV, V], V 64 or 128.
    beta: write strengths [B, T, HV].
    g: None or the log-decay [B, T, HV].
    scale: factor of the output.
    initial_state: float32 [B, HV, K, V].
    segment_ids: None or int32 [B, T].
    normalize_qk: divide q and k by their norms.
    chunk_size: None or 64.
    exchange: None, or of the devices that share the row.
    config: None means that of the table; see `mosaic_gpu_config.config_for`.

  Returns:
    o [B, T, HV, V] bfloat16 and the final state, float32 [B, HV, K, V].

  Raises:
    NotImplementedError: the kernels do not cover the arguments.
  """
  _check(q, v, g, chunk_size)
  batch, length, heads, key_size = q.shape
  value_heads, value_size = v.shape[2:]
  padded = -(-length // _ROWS) * _ROWS
  sizes = layout.Sizes(
    B=batch,
    T=padded,
    H=heads,
    HV=value_heads,
    K=key_size,
    V=value_size,
    gated=g is not None or segment_ids is not None,
    scale=float(scale),
    normalized=normalize_qk,
  )
  counts = _Counts(None, None)
  if segment_ids is not None:
    resets, valid = decay.count_resets(chunking.pad_time(segment_ids, padded))
    counts = _Counts(resets != decay.previous_resets(resets), valid)
  config = config or config_lib.config_for(key_size, value_size)
  static = _Static(sizes, config)
  arrays = [chunking.pad_time(x, padded) for x in (q, k, v, beta, g)]
  inputs = _Inputs(*arrays, initial_state)
  o, state = _delta_rule(static, inputs, counts, exchange)
  return o[:, :length], state
