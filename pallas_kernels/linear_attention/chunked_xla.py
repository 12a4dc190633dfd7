"""Linear attention chunk by chunk in plain XLA, with its own VJP.

Inside a chunk of C tokens with queries Q, keys K, values V and the state S that
enters it, the recurrence of `api.linear_attention` has the closed form

    O = Q_in S + P V        S' = keep S + K_out^T V

with the decays entry, exit, keep and D of `pallas_kernels.decay`:
K_out = exit K and, where a token reads after its own write,

    Q_in = scale entry Q    P_ij = scale sum_k q_ik k_jk D_ijk for j <= i.

With a bonus u, token i reads before its own decay and write, that is, what
token i - 1 would read after them, if no segment starts in between. So its row
of entry and D is the one before (1 for the chunk's first), and the diagonal is

    P_ii = scale sum_k q_ik u_k k_ik.

With dO and dS' given,

    dP = dO V^T             dV = P^T dO + K_out dS'
    dQ_in = dO S^T          dK_out = V dS'^T
    dkeep = rowsum(S dS')   dS = keep dS' + Q_in^T dO,

and dP, dQ_in, dK_out, dkeep go back to q, k, g and u through what made them.
Saved for the backward pass are the inputs and the state that enters each chunk.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunking
from pallas_kernels import decay


class _Static(NamedTuple):
  """What is fixed at trace time."""

  scale: float
  layout: chunking.Layout


class _Inputs(NamedTuple):
  """Padded to whole groups."""

  q: jax.Array  # [B, T, H, K]
  k: jax.Array  # [B, T, H, K]
  v: jax.Array  # [B, T, HV, V]
  g: jax.Array | None  # [B, T, HV, 1 or K]


class _Prepared(NamedTuple):
  """What a group's keys, queries and decays come to."""

  p: jax.Array  # [M, B, HV, C, C]
  q_in: jax.Array  # [M, B, HV, C, K]
  k_out: jax.Array  # [M, B, HV, C, K]
  keep: jax.Array | None  # [M, B, HV, 1 or K, 1]


def _one_later(x, first):
  """Moves rows [..., C, K] one token on; the first one is `first`."""
  widths = [(0, 0)] * (x.ndim - 2) + [(1, 0), (0, 0)]
  return jnp.pad(x[..., :-1, :], widths, constant_values=first)


def _one_earlier(x):
  """Moves rows [..., C, K] one token back; the last one is 0."""
  widths = [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]
  return jnp.pad(x[..., 1:, :], widths)


def _reads_before_write(q, k, g, bonus, entry, cut):
  """Returns P and entry where a token reads before its decay and write."""
  p = _one_later(decay.scores(_one_earlier(q), k, g, cut), 0)
  if entry is not None:
    entry = _one_later(entry, 1)
  if cut is not None:
    p = jnp.where(cut.same, p, 0)
    entry = jnp.where(cut.entry, entry, 0)
  bonus = jnp.expand_dims(bonus, (0, 1, 3))  # [1, 1, HV, 1, K]
  own = jnp.sum(q * bonus * k, axis=-1, keepdims=True)  # [M, B, HV, C, 1]
  return jnp.where(jnp.eye(p.shape[-1], dtype=bool), own, p), entry


def _prepare(q, k, g, bonus, cut, scale) -> _Prepared:
  """q, k, g are of a group, in chunks."""
  q = scale * q
  factors = decay.passage(g, cut)
  if bonus is None:
    p, entry = decay.scores(q, k, g, cut), factors.entry
  else:
    p, entry = _reads_before_write(q, k, g, bonus, factors.entry, cut)
  return _Prepared(
    p,
    decay.scaled(q, entry),
    decay.scaled(k, factors.exit),
    factors.keep,
  )


def _chunks(inputs: _Inputs, static: _Static):
  """Returns q, k, v, g of a group in chunks."""
  chunks, heads = static.layout.chunks_per_group, inputs.v.shape[2]
  return jax.tree.map(lambda x: chunking.to_chunks(x, chunks, heads), inputs)


def _pass_on(state, keep, added, *, reverse=False):
  """Runs S' = keep S + added over chunks; returns the last S' and every S."""

  def step(state, xs):
    keep, added = xs
    return decay.scaled(state, keep) + added, state

  return chunking.scan_chunks(step, state, (keep, added), reverse=reverse)


def _forward_group(state, parts, saved, *, bonus, static: _Static):
  del saved
  inputs, counts = parts
  q, k, v, g = _chunks(inputs, static)
  cut = decay.segments(*counts, static.layout.chunks_per_group)
  made = _prepare(q, k, g, bonus, cut, static.scale)
  writes = chunking.transpose(made.k_out) @ v  # [M, B, HV, K, V]
  state, states = _pass_on(state, made.keep, writes)
  o = made.q_in @ states + made.p @ v
  return state, chunking.from_chunks(o, inputs.v), states


def _backward_group(carry, parts, states, *, bonus, static: _Static):
  dstate, dbonus = carry
  inputs, counts, do = parts
  q, k, v, g = _chunks(inputs, static)
  chunks, heads = static.layout.chunks_per_group, inputs.v.shape[2]
  do = chunking.to_chunks(do, chunks, heads)
  cut = decay.segments(*counts, chunks)
  made, pullback = jax.vjp(
    lambda *args: _prepare(*args, cut, static.scale), q, k, g, bonus
  )
  reads = chunking.transpose(made.q_in) @ do  # [M, B, HV, K, V]
  dstate, dstates = _pass_on(dstate, made.keep, reads, reverse=True)
  dv = chunking.transpose(made.p) @ do + made.k_out @ dstates
  dkeep = None
  if made.keep is not None:
    dkeep = chunking.sum_to(states * dstates, made.keep.shape)
  dq, dk, dg, dbonus_here = pullback(
    _Prepared(
      chunking.outer(do, v),
      chunking.outer(do, states),
      chunking.outer(v, dstates),
      dkeep,
    )
  )
  gradients = jax.tree.map(
    chunking.from_chunks,
    _Inputs(dq, dk, dv, dg),
    inputs,
  )
  dbonus = jax.tree.map(jnp.add, dbonus, dbonus_here)
  return (dstate, dbonus), gradients, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, inputs, bonus, initial_state, counts):
  return _forward(static, inputs, bonus, initial_state, counts)[0]


def _forward(static, inputs, bonus, initial_state, counts):
  """Returns ((o, final_state), residuals)."""
  inputs, bonus, initial_state = chunking.first_order_only(
    (inputs, bonus, initial_state)
  )
  with jax.default_matmul_precision(chunking.precision_for(inputs.q.dtype)):
    state, o, states = chunking.scan_groups(
      functools.partial(_forward_group, bonus=bonus, static=static),
      initial_state,
      (inputs, counts),
      groups=static.layout.groups,
    )
  return (o, state), (inputs, bonus, counts, states)


def _backward(static, residuals, cotangents):
  residuals, cotangents = chunking.first_order_only((residuals, cotangents))
  inputs, bonus, counts, states = residuals
  do, dfinal = cotangents
  with jax.default_matmul_precision(chunking.precision_for(inputs.q.dtype)):
    (dstate, dbonus), gradients, _ = chunking.scan_groups(
      functools.partial(_backward_group, bonus=bonus, static=static),
      (dfinal, jax.tree.map(jnp.zeros_like, bonus)),
      (inputs, counts, do),
      states,
      groups=static.layout.groups,
      reverse=True,
    )
  return gradients, dbonus, dstate, None


_chunked.defvjp(_forward, _backward)


def _default_chunk(g) -> int:
  # Scores with decays per channel are dearer: log2 C passes over the keys.
  return 32 if g is not None and g.ndim == 4 else 64


def linear_attention(
  q, k, v, g, bonus, *, scale, initial_state, segment_ids, chunk_size=None
):
  """Runs the chunkwise form; see `api.linear_attention`.

  Raises:
    NotImplementedError: the dtype is float64.
  """
  if q.dtype == jnp.float64:
    raise NotImplementedError('it computes in float32, got float64 inputs')
  length = q.shape[1]
  layout = chunking.layout(length, chunk_size or _default_chunk(g))
  if g is not None:
    g = g.reshape(*v.shape[:3], -1)
  if bonus is not None:
    bonus = bonus.astype(jnp.float32)
  inputs, counts = _Inputs(q, k, v, g), (None, None)
  if segment_ids is not None:
    resets, valid = decay.count_resets(segment_ids)
    inputs = jax.tree.map(
      lambda x: jnp.where(jnp.expand_dims(valid, range(2, x.ndim)), x, 0),
      inputs,
    )
    resets = chunking.pad_time(resets, layout.length, 'edge')
    counts = resets, decay.previous_resets(resets)
  # Zero keys, values and log-decays leave the state alone.
  inputs = jax.tree.map(lambda x: chunking.pad_time(x, layout.length), inputs)
  static = _Static(float(scale), layout)
  o, state = _chunked(static, inputs, bonus, initial_state, counts)
  return o[:, :length], state
