"""The delta rule chunk by chunk in plain XLA, with its own VJP.

Inside a chunk of C tokens with queries Q, keys K, values V, strengths b and
the state S that enters it, the recurrence of `api.delta_rule` has the closed
form (UT transform; equations 8 to 11 of the paper, there transposed)

    G = strict_tril(K K^T . D)       X = (I + b G)^-1 b (V - K_in S)
    P = scale * tril(Q K^T . D)      E = V - K_in S - G X     (so X = b E)
    O = Q_in S + P X                 S' = keep S + K_out^T X

with the decays D, K_in = entry K, K_out = exit K, Q_in = scale entry Q of
`pallas_kernels.decay`; without decay and resets all of them are 1. X are the
values written, E the errors that the delta rule corrects. The gradient needs no
derivative of the inverse. With dO and dS' given,

    dX = P^T dO + K_out dS'          dR = (I + b G)^-T dX
    dV = b dR                        db = rowsum(dR E)
    dP = dO X^T                      dG = -dV X^T
    dQ_in = dO S^T                   dK_in = -dV S^T
    dK_out = X dS'^T                 dkeep = rowsum(S dS')
    dS = keep dS' + Q_in^T dO - K_in^T dV,

and these go back to q, k and g through what made G, P, Q_in, K_in and K_out.
Saved for the backward pass are the state that enters each chunk, X, E and the
inverse. (X is not recomputed as b E: for aligned keys the sums over X cancel,
and only the X that was solved for cancels to rounding.)

With n keys per token (`delta_product`), k, v and beta have n entries per token
and g is zero but at the first of them; each query reads after the last.

For float32 inputs G and the inverse are computed in float64 and then rounded.
Where keys are nearly parallel and beta is near 2, sums over X cancel to a
fraction of their terms, and G rounded to float32 beforehand would cost several
times the error of the scan over tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunking
from pallas_kernels import decay
from pallas_kernels import triangular_inverse


# Stands for a strength of 0 where a gradient is divided by it.
_LEAST = 2.0**-60


class _Static(NamedTuple):
  """What is fixed at trace time."""

  scale: float
  layout: chunking.Layout
  keys_per_token: int


class _Inputs(NamedTuple):
  """Padded to whole groups; n keys per token, T = n times the tokens.

  In chunks (`_chunks`) they are float32 of M chunks and N = B HV heads.
  """

  q: jax.Array  # [B, T / n, H, K]; [M, N, C / n, K]
  k: jax.Array  # [B, T, H, K]; [M, N, C, K]
  v: jax.Array  # [B, T, HV, V]; [M, N, C, V]
  beta: jax.Array  # [B, T, HV]; [M, N, C, 1]
  g: jax.Array | None  # [B, T, HV, 1 or K]; [M, N, C, 1 or K]


class _Solved(NamedTuple):
  """What the backward pass reads of a group, beside the inputs."""

  states: jax.Array  # [M, N, K, V], entering each chunk
  x: jax.Array  # [M, N, C, V]
  error: jax.Array  # [M, N, C, V]
  inverse_t: tuple[jax.Array, ...]  # [M, N, C, C] each, to be summed


class _Decays(NamedTuple):
  """Decays per head of a group; None stands for 1."""

  pair: jax.Array | None  # [M, N, C, C], in the dtype of what is solved
  passage: decay.Passage


class _Prepared(NamedTuple):
  """What a group's keys, queries and decays come to."""

  gram: jax.Array  # [M, N, C, C]
  p: jax.Array  # [M, N, C / n, C]
  q_in: jax.Array  # [M, N, C / n, K]
  k_in: jax.Array  # [M, N, C, K]
  k_out: jax.Array  # [M, N, C, K]
  keep: jax.Array | None  # [M, N, 1 or K, 1]


def _per_channel(g) -> bool:
  return g is not None and g.shape[-1] > 1


def _decays(g, cut, dtype) -> _Decays | None:
  """Returns the decays of g, or None where g is per channel."""
  if _per_channel(g):
    return None
  if g is None:
    return _Decays(None, decay.passage(None, cut))
  g = g.astype(dtype)
  pair = jax.lax.optimization_barrier(decay.pair_decay(g))
  factors = jax.tree.map(
    lambda x: x.astype(jnp.float32), decay.passage(g, cut)
  )
  return _Decays(pair, factors)


def _prepare(q, k, g, cut, decays, static: _Static) -> _Prepared:
  """q, k, g are of a group, in chunks."""
  q = static.scale * q
  stride = static.keys_per_token
  if decays is None:
    pair, factors = None, decay.passage(g, cut)
  else:
    pair, factors = decays
  if pair is not None:
    pair = pair.astype(jnp.float32)
  entry_q = factors.entry
  if entry_q is not None:
    entry_q = entry_q[..., stride - 1 :: stride, :]
  return _Prepared(
    decay.scores(k, k, g, cut, strict=True, pair=pair),
    decay.scores(q, k, g, cut, stride=stride, pair=pair),
    decay.scaled(q, entry_q),
    decay.scaled(k, factors.entry),
    decay.scaled(k, factors.exit),
    factors.keep,
  )


def _invert(inputs: _Inputs, cut, decays, dtype):
  """Returns (I + G b)^-1, computed in `dtype`."""
  k, g, beta = jax.tree.map(
    lambda x: x.astype(dtype), (inputs.k, inputs.g, inputs.beta)
  )
  pair = None if decays is None else decays.pair
  gram = decay.scores(k, k, g, cut, strict=True, pair=pair)
  strength = jnp.swapaxes(jnp.maximum(beta, _LEAST), -1, -2)
  return triangular_inverse.unit_lower_inverse(gram * strength, exact=False)


def _write(state, inputs: _Inputs, cut, *, static: _Static, dtype):
  """Takes the state through the chunks of a group; solves in `dtype`.

  Returns:
    the state after the group, O and what the backward pass reads.
  """
  decays = _decays(inputs.g, cut, dtype)
  made = _prepare(inputs.q, inputs.k, inputs.g, cut, decays, static)
  inverse = _invert(inputs, cut, decays, dtype)
  k_out_t = chunking.transpose(made.k_out)
  beta = inputs.beta.astype(dtype)
  state = state[0]
  states, writes, errors = [], [], []
  for m, v in enumerate(inputs.v):
    fresh = v - made.k_in[m] @ state
    error = inverse[m] @ fresh.astype(dtype)
    x = (beta[m] * error).astype(jnp.float32)
    states.append(state)
    writes.append(x)
    errors.append(error.astype(jnp.float32))
    keep = None if made.keep is None else made.keep[m]
    state = decay.scaled(state, keep) + k_out_t[m] @ x
    state = jax.lax.optimization_barrier(state)
  states, x, error = map(jnp.stack, (states, writes, errors))
  o = made.q_in @ states + made.p @ x
  inverse_t = jnp.swapaxes(inverse, -1, -2)
  parts = (inverse_t.astype(jnp.float32),)
  if dtype == jnp.float64:
    rest = inverse_t - parts[0].astype(dtype)
    parts += (rest.astype(jnp.float32),)
  return state[None], o, _Solved(states, x, error, parts)


def _read(dstate, made, beta, inverse_t, dx_o, read, dtype):
  """Takes dS' back through the chunks of a group; solves in `dtype`.

  Returns:
    dS before the group, dV and dS' of every chunk.
  """
  strength = jnp.maximum(beta, _LEAST).astype(dtype)
  inverse_t = sum(x.astype(dtype) for x in inverse_t)
  k_in_t = chunking.transpose(made.k_in)
  dvs, dstates = [], []
  for m in reversed(range(dx_o.shape[0])):
    dx = (dx_o[m] + made.k_out[m] @ dstate).astype(dtype)
    dv = (inverse_t[m] @ (strength[m] * dx)).astype(jnp.float32)
    dvs.append(dv)
    dstates.append(dstate)
    keep = None if made.keep is None else made.keep[m]
    dstate = decay.scaled(dstate, keep) + (read[m] - k_in_t[m] @ dv)
    dstate = jax.lax.optimization_barrier(dstate)
  dv, dstates = (jnp.stack(xs[::-1]) for xs in (dvs, dstates))
  return dstate, dv, dstates


def _cotangents(made: _Prepared, do, dv, x, states, dstates) -> _Prepared:
  """Returns the gradients of what `_prepare` made."""
  dkeep = None
  if made.keep is not None:
    dkeep = chunking.sum_to(states * dstates, made.keep.shape)
  return _Prepared(
    -chunking.outer(dv, x),
    chunking.outer(do, x),
    chunking.outer(do, states),
    -chunking.outer(dv, states),
    chunking.outer(x, dstates),
    dkeep,
  )


def _row_sums(x, y):
  return jnp.sum(x * y, axis=-1, keepdims=True)


def _dg(inputs, cut, pair, made, back, do, dv, x, static: _Static, dtype):
  """Returns dg of decays per head; `back` are the gradients of `made`.

  A log-decay's gradient sums what crosses its token: pairs of a write before
  and a read after it, the entering state on its way to reads after it, writes
  before it on their way to the leaving state, and what passes through. For
  aligned keys the pairs cancel as the sums over X do.
  """
  stride, outer = static.keys_per_token, chunking.outer
  entered = _row_sums(made.k_in, back.k_in)
  reads = _row_sums(made.q_in, back.q_in)
  entered = entered.at[..., stride - 1 :: stride, :].add(reads)
  left = _row_sums(made.k_out, back.k_out)
  wide = (inputs.q, inputs.k, do, dv, x, entered, left, made.keep * back.keep)
  q, k, do, dv, x, entered, left, passed = (a.astype(dtype) for a in wide)
  if cut is not None:
    pair = jnp.where(cut.same, pair, 0)
  read = static.scale * outer(do, x) * outer(q, k)
  pairs = decay.crossings(read * pair[..., stride - 1 :: stride, :], stride)
  pairs -= decay.crossings(outer(dv, x) * outer(k, k) * pair)
  from_here = jnp.triu(jnp.ones(pair.shape[-2:], dtype))
  return pairs + passed + from_here @ entered + (1 - from_here) @ left


def _return(dstate, inputs, solved, do, cut, *, static: _Static, dtype):
  """Takes the gradients back through a group; solves in `dtype`.

  Returns:
    dS before the group and the gradients of the inputs.
  """
  q, k, g = inputs.q, inputs.k, inputs.g
  decays = _decays(g, cut, dtype)
  made, pullback = jax.vjp(
    lambda q, k, g: _prepare(q, k, g, cut, decays, static), q, k, g
  )
  p_t, q_in_t = map(chunking.transpose, (made.p, made.q_in))
  dstate, dv, dstates = _read(
    dstate[0],
    made,
    inputs.beta,
    solved.inverse_t,
    p_t @ do,
    q_in_t @ do,
    dtype,
  )
  back = _cotangents(made, do, dv, solved.x, solved.states, dstates)
  dq, dk, dg = pullback(back)
  if g is not None and not _per_channel(g):
    dg = _dg(
      inputs, cut, decays.pair, made, back, do, dv, solved.x, static, dtype
    )
  strength = jnp.maximum(inputs.beta, _LEAST)
  dbeta = _row_sums(dv, solved.error) / strength
  gradients = _Inputs(dq, dk, dv, dbeta, dg)
  gradients = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
  return dstate[None], gradients


def _group(function, static: _Static, dtype):
  """Returns `_write` or `_return` for inputs of a dtype."""
  if dtype != jnp.float32:
    return functools.partial(function, static=static, dtype=jnp.float32)

  def exactly(*arguments):
    with jax.default_matmul_precision('highest'):
      return function(*arguments, static=static, dtype=jnp.float64)

  return chunking.with_float64(exactly)


def _chunks(x, static: _Static, heads: int):
  """Returns [B, L, H, ...] as float32 [M, B HV, C, ...]."""
  x = chunking.to_chunks(x, static.layout.chunks_per_group, heads)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunked_inputs(inputs: _Inputs, static: _Static) -> _Inputs:
  inputs = inputs._replace(beta=inputs.beta[..., None])
  heads = inputs.v.shape[2]
  return jax.tree.map(lambda x: _chunks(x, static, heads), inputs)


def _from_chunks(x, own: int, heads: int):
  """Returns [M, B HV, C, ...] as [B, L, own, ...], groups of heads summed."""
  x = x.reshape(x.shape[0], -1, heads, *x.shape[2:])
  return chunking.from_chunks(x, own)


def _segments(counts, static: _Static, heads: int):
  """Returns the segments of a group for every head, or None."""
  cut = decay.segments(*counts, static.layout.chunks_per_group)
  return jax.tree.map(
    lambda x: jnp.repeat(x[:, :, 0], heads, axis=1), cut
  )


def _forward_group(state, parts, saved, *, static: _Static):
  del saved
  inputs, counts = parts
  heads = inputs.v.shape[2]
  state, o, solved = _group(_write, static, inputs.q.dtype)(
    state[None],
    _chunked_inputs(inputs, static),
    _segments(counts, static, heads),
  )
  return state[0], _from_chunks(o, heads, heads), solved


def _backward_group(dstate, parts, solved: _Solved, *, static: _Static):
  inputs, counts, do = parts
  heads = inputs.v.shape[2]
  dstate, gradients = _group(_return, static, inputs.q.dtype)(
    dstate[None],
    _chunked_inputs(inputs, static),
    solved,
    _chunks(do, static, heads),
    _segments(counts, static, heads),
  )
  gradients = gradients._replace(beta=gradients.beta[..., 0])
  gradients = jax.tree.map(
    lambda d, x: _from_chunks(d, x.shape[2], heads), gradients, inputs
  )
  return dstate[0], gradients, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, inputs, initial_state, counts):
  return _forward(static, inputs, initial_state, counts)[0]


def _forward(static, inputs, initial_state, counts):
  """Returns ((o, final_state), residuals)."""
  inputs, initial_state = chunking.first_order_only((inputs, initial_state))
  with jax.default_matmul_precision(chunking.precision_for(inputs.q.dtype)):
    b, length, _, _ = inputs.q.shape
    state, o, solved = chunking.scan_groups(
      functools.partial(_forward_group, static=static),
      initial_state.reshape(-1, *initial_state.shape[2:]),
      (inputs, counts),
      outputs=jax.ShapeDtypeStruct(
        (b, length, *inputs.v.shape[2:]), inputs.v.dtype
      ),
      groups=static.layout.groups,
    )
  state = state.reshape(initial_state.shape)
  return (o, state), (inputs, counts, solved)


def _backward(static, residuals, cotangents):
  residuals, cotangents = chunking.first_order_only((residuals, cotangents))
  inputs, counts, solved = residuals
  do, dfinal = cotangents
  with jax.default_matmul_precision(chunking.precision_for(inputs.q.dtype)):
    dstate, gradients, _ = chunking.scan_groups(
      functools.partial(_backward_group, static=static),
      dfinal.reshape(-1, *dfinal.shape[2:]),
      (inputs, counts, do),
      solved,
      outputs=inputs,
      groups=static.layout.groups,
      reverse=True,
    )
  return gradients, dstate.reshape(dfinal.shape), None


_chunked.defvjp(_forward, _backward)


def _default_chunk(q, v) -> int:
  key_dim, value_dim = q.shape[-1], v.shape[-1]
  if q.dtype == jnp.float32:
    # More keys than dimensions depend on one another, sums over X cancel, and
    # in longer chunks they lose digits.
    return min(32, key_dim)
  return 32 if max(key_dim, value_dim) <= 64 else 64


def _run(inputs: _Inputs, scale, initial_state, segment_ids, chunk_size):
  """Pads to whole groups and runs; inputs as in `_Inputs`, not yet padded."""
  q, v = inputs.q, inputs.v
  if q.dtype == jnp.float64:
    raise NotImplementedError('it computes in float32, got float64 inputs')
  length, n = q.shape[1], v.shape[1] // q.shape[1]
  chunk = max(1, (chunk_size or _default_chunk(q, v)) // n)  # in tokens
  layout = chunking.layout(n * length, n * chunk)
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
  static = _Static(float(scale), layout, n)
  o, state = _chunked(static, inputs, initial_state, counts)
  return o[:, :length], state


def delta_rule(
  q, k, v, beta, g, *, scale, initial_state, segment_ids, chunk_size=None
):
  """Runs the chunkwise form; see `api.delta_rule`.

  Raises:
    NotImplementedError: the dtype is float64.
  """
  if g is not None:
    g = g.reshape(*v.shape[:3], -1)
  inputs = _Inputs(q, k, v, beta, g)
  return _run(inputs, scale, initial_state, segment_ids, chunk_size)


def delta_product(
  q, k, v, beta, g, *, scale, initial_state, segment_ids, chunk_size=None
):
  """Runs the chunkwise form; see `product_api.delta_product`.

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
  inputs = _Inputs(q, k, v, beta, g)
  return _run(inputs, scale, initial_state, segment_ids, chunk_size)
