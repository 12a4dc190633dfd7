"""The delta rule chunk by chunk in plain XLA, with its own VJP.

The groups of chunks into which `chunking` cuts the time axis are passed through
one after another, forward for the values, in reverse for the gradients. What
happens inside a group, and its equations, are in `chunked_xla_group`.

Of a row that devices share (`sequence_parallel`) each goes through its part
once, with the K columns of a `Reach` R beside those of V. When the state S_in
that enters is known, so are

    O + R_O S_in        X + R_X S_in        S + R_S S_in,

S the states that enter the groups; and R_O^T dO is what the part's own outputs
give of the gradient of S_in.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunking
from pallas_kernels import decay
from pallas_kernels import sequence_parallel
from pallas_kernels.delta_rule import chunked_xla_group as group


def _chunks(x, static: group.Static, heads: int):
  """Returns [B, L, H, ...] as float32 [M, B HV, C, ...]."""
  x = chunking.to_chunks(x, static.layout.chunks_per_group, heads)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunked_inputs(inputs: group.Inputs, static: group.Static) -> group.Inputs:
  inputs = inputs._replace(beta=inputs.beta[..., None])
  heads = inputs.v.shape[2]
  return jax.tree.map(lambda x: _chunks(x, static, heads), inputs)


def _from_chunks(x, like, heads: int):
  """Returns [M, B HV, C, ...] as [B, L, H, ...], of the heads of `like`."""
  x = x.reshape(x.shape[0], -1, heads, *x.shape[2:])
  return chunking.from_chunks(x, like)


def _segments(counts, static: group.Static, heads: int):
  """Returns the segments of a group for every head, or None."""
  cut = decay.segments(*counts, static.layout.chunks_per_group)
  return jax.tree.map(lambda x: jnp.repeat(x[:, :, 0], heads, axis=1), cut)


def _forward_group(states, parts, saved, *, static: group.Static):
  """Returns O among what is saved, in chunks, where there is a `Reach`."""
  del saved
  inputs, counts = parts
  heads = inputs.v.shape[2]
  write = group.for_inputs(group.write, static, inputs.q.dtype)
  states, o, solved, reach = write(
    jax.tree.map(lambda x: x[None], states),
    _chunked_inputs(inputs, static),
    _segments(counts, static, heads),
  )
  states = jax.tree.map(lambda x: x[0], states)
  if reach is None:
    return states, _from_chunks(o, inputs.v, heads), (solved, None)
  return states, None, (solved, (o, reach))


def _backward_group(
  dstate, parts, solved: group.Solved, *, static: group.Static
):
  inputs, counts, do = parts
  heads = inputs.v.shape[2]
  dstate, gradients = group.for_inputs(group.take_back, static, inputs.q.dtype)(
    dstate[None],
    _chunked_inputs(inputs, static),
    solved,
    _chunks(do, static, heads),
    _segments(counts, static, heads),
  )
  gradients = gradients._replace(beta=gradients.beta[..., 0])
  gradients = jax.tree.map(
    lambda d, x: _from_chunks(d, x, heads), gradients, inputs
  )
  return dstate[0], gradients, None


class _Shared(NamedTuple):
  """What the backward pass needs of a row that devices share."""

  exchange: sequence_parallel.Exchange
  reach: jax.Array  # [N, T / n, K], that of O
  transition: jax.Array  # [B, HV, K, K]


def _rows(x):
  """Returns [groups, M, N, C, ...] as [N, T, ...]."""
  x = jnp.moveaxis(x, 2, 0)
  return x.reshape(x.shape[0], -1, *x.shape[4:])


@jax.default_matmul_precision('highest')
def _enter(exchange, states, solved: group.Solved, o, reach: group.Reach):
  """Adds what a part has of the state that enters it.

  Args:
    exchange: of the part.
    states: [B, HV, K, V + K], the part's [E, M].
    solved: of all groups, found without that state.
    o: in chunks of groups, as well.
    reach: of all groups.

  Returns:
    the last state, `solved`, O [B, T / n, HV, V] and what is shared.
  """
  entering, transition = exchange.enter(states)
  batch, heads, _, value_dim = entering.shape
  state = states[..., :value_dim] + transition @ entering
  entering = entering.reshape(batch * heads, -1, value_dim)
  read = _rows(reach.o)
  o = (_rows(o) + read @ entering).reshape(batch, heads, -1, value_dim)
  solved = solved._replace(
    state=solved.state + reach.state @ entering,
    x=solved.x + reach.x @ entering,
  )
  shared = _Shared(exchange, read, transition)
  return state, solved, jnp.moveaxis(o, 1, 2), shared


@jax.default_matmul_precision('highest')
def _leave(shared: _Shared, do, dfinal):
  """Adds to the last state's gradient what the parts behind find.

  Args:
    shared: of the part.
    do: [B, T / n, HV, V].
    dfinal: [B, HV, K, V].
  """
  do = jnp.moveaxis(do.astype(jnp.float32), 2, 1)
  read = shared.reach.reshape(*do.shape[:3], -1)
  own = jnp.einsum('bhtk,bhtv->bhkv', read, do)
  own += jnp.swapaxes(shared.transition, -1, -2) @ dfinal
  return dfinal + shared.exchange.leave(own, shared.transition)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, inputs, initial_state, counts, exchange):
  return _forward(static, inputs, initial_state, counts, exchange)[0]


def _forward(static, inputs, initial_state, counts, exchange):
  """Returns ((o, final_state), residuals)."""
  inputs, initial_state = chunking.first_order_only((inputs, initial_state))
  rows = initial_state.shape[:2]
  first = initial_state.reshape(-1, *initial_state.shape[2:])
  eye = None
  if exchange is not None:
    eye = jnp.eye(first.shape[1], dtype=first.dtype)
    eye = jnp.broadcast_to(eye, (first.shape[0], *eye.shape))
  with jax.default_matmul_precision(chunking.precision_for(inputs.q.dtype)):
    states, o, (solved, found) = chunking.scan_groups(
      functools.partial(_forward_group, static=static),
      (first, eye),
      (inputs, counts),
      groups=static.layout.groups,
    )
  shared = None
  states = [x.reshape(*rows, *x.shape[1:]) for x in states if x is not None]
  state = jnp.concatenate(states, axis=-1)
  if exchange is not None:
    state, solved, o, shared = _enter(exchange, state, solved, *found)
    o = o.astype(inputs.v.dtype)
  return (o, state), (inputs, counts, solved, shared)


def _backward(static, residuals, cotangents):
  residuals, cotangents = chunking.first_order_only((residuals, cotangents))
  inputs, counts, solved, shared = residuals
  do, dfinal = cotangents
  if shared is not None:
    dfinal = _leave(shared, do, dfinal)
  with jax.default_matmul_precision(chunking.precision_for(inputs.q.dtype)):
    dstate, gradients, _ = chunking.scan_groups(
      functools.partial(_backward_group, static=static),
      dfinal.reshape(-1, *dfinal.shape[2:]),
      (inputs, counts, do),
      solved,
      groups=static.layout.groups,
      reverse=True,
    )
  return gradients, dstate.reshape(dfinal.shape), None, None


_chunked.defvjp(_forward, _backward)


def _has_channels(g) -> bool:
  return g is not None and g.shape[-1] > 1


def _default_chunk(q, v, g) -> int:
  key_dim, value_dim = q.shape[-1], v.shape[-1]
  if q.dtype == jnp.float32:
    # More keys than dimensions depend on one another, sums over X cancel, and
    # in chunks that are longer yet they lose digits.
    # With a decay each pair of a chunk costs an exponential, per channel K.
    is_short = max(key_dim, value_dim) <= 64 or _has_channels(g)
    return min(32 if is_short else 64, key_dim)
  return 32 if max(key_dim, value_dim) <= 64 else 64


def _chunks_per_group(q, v, g) -> int:
  # Small arrays are worth more company; large ones would leave the caches.
  if max(q.shape[-1], v.shape[-1]) <= 64 and not _has_channels(g):
    return 4 * chunking.CHUNKS_PER_GROUP
  return chunking.CHUNKS_PER_GROUP


def _run(
  inputs: group.Inputs, scale, initial_state, segment_ids, chunk_size, exchange
):
  """Pads to whole groups and runs; the inputs are not padded yet."""
  q, v = inputs.q, inputs.v
  if q.dtype == jnp.float64:
    raise NotImplementedError('it computes in float32, got float64 inputs')
  length, n = q.shape[1], v.shape[1] // q.shape[1]
  chunk_size = chunk_size or _default_chunk(q, v, inputs.g)
  chunk = max(1, chunk_size // n)  # in tokens
  layout = chunking.layout(
    n * length, n * chunk, _chunks_per_group(q, v, inputs.g)
  )
  counts = (None, None)
  if segment_ids is not None:
    resets, valid = decay.count_resets(segment_ids)
    inputs = jax.tree.map(
      lambda x: chunking.zero_where_not(
        x, jnp.repeat(valid, x.shape[1] // length, axis=1)
      ),
      inputs,
    )
    resets = jnp.repeat(resets, n, axis=1)
    resets = chunking.pad_time(resets, layout.length, 'edge')
    counts = resets, decay.previous_resets(resets)
  # Zero keys, values, strengths and log-decays leave the state alone.
  inputs = jax.tree.map(
    lambda x: chunking.pad_time(x, layout.length * x.shape[1] // (n * length)),
    inputs,
  )
  static = group.Static(float(scale), layout, n)
  o, state = _chunked(static, inputs, initial_state, counts, exchange)
  return o[:, :length], state


def delta_rule(
  q,
  k,
  v,
  beta,
  g,
  *,
  scale,
  initial_state,
  segment_ids,
  chunk_size=None,
  exchange=None,
):
  """Runs the chunkwise form; see `api.delta_rule`.

  With an `exchange`, time is a part of the row; see `sequence_parallel`.

  Raises:
    NotImplementedError: the dtype is float64.
  """
  if g is not None:
    g = g.reshape(*v.shape[:3], -1)
  inputs = group.Inputs(q, k, v, beta, g)
  return _run(inputs, scale, initial_state, segment_ids, chunk_size, exchange)


def delta_product(
  q,
  k,
  v,
  beta,
  g,
  *,
  scale,
  initial_state,
  segment_ids,
  chunk_size=None,
  exchange=None,
):
  """Runs the chunkwise form; see `product_api.delta_product`.

  With an `exchange`, time is a part of the row; see `sequence_parallel`.

  Raises:
    NotImplementedError: the dtype is float64, or g is per channel.
  """
  n = k.shape[2]
  if g is not None:
    if g.ndim > 3:
      raise NotImplementedError('it has no decay per channel, got g of 4 axes')
    # The decay of a token comes before the first of its keys.
    g = jnp.pad(g[:, :, None], ((0, 0), (0, 0), (0, n - 1), (0, 0)))[..., None]
  k, v, beta, g = (
    x if x is None else x.reshape(x.shape[0], -1, *x.shape[3:])
    for x in (k, v, beta, g)
  )
  inputs = group.Inputs(q, k, v, beta, g)
  return _run(inputs, scale, initial_state, segment_ids, chunk_size, exchange)
