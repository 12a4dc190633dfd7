"""The delta rule chunk by chunk in plain XLA, with its own VJP.

Inside a chunk of C tokens with queries Q, keys K, values V, strengths b and
the state S that enters it, the recurrence of `api.delta_rule` has the closed
form (UT transform; equations 8 to 11 of the paper, there transposed)

    G = strict_tril(K K^T)           X = (I + b G)^-1 b (V - K S)
    P = scale * tril(Q K^T)          E = V - K S - G X        (so X = b E)
    O = scale * Q S + P X            S' = S + K^T X.

X are the values written, E the errors that the delta rule corrects. The
gradient needs no derivative of the inverse. With dO and dS' given,

    dX = P^T dO + K dS'              dR = (I + b G)^-T dX
    dV = b dR                        db = rowsum(dR E)
    dP = scale * tril(dO X^T)        dG = -strict_tril(dV X^T)
    dQ = dP K + scale * dO S^T
    dK = dP^T Q + (dG + dG^T) K - dV S^T + X dS'^T
    dS = dS' + scale * Q^T dO - K^T dV.

One `lax.scan` step does everything of a chunk, so nothing of size [T, T] or
[T, C, C] is formed; saved for the backward pass are the state that enters each
chunk, X, E and the inverse. (X is not recomputed as b E: for aligned keys the
sums over X cancel, and only the X that was solved for cancels to rounding.)

Segments enter as a count of the resets so far, one number per token: pairs of
tokens meet only where it is equal, and the entering state is seen only by
tokens whose count is that of the chunk before.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.delta_rule import triangular_inverse

_HIGHEST = jax.lax.Precision.HIGHEST


class _Static(NamedTuple):
  """What is fixed at trace time."""

  scale: float
  chunk: int
  precision: jax.lax.Precision


class _Chunk(NamedTuple):
  """One chunk in float32, q and k repeated over the group of value heads.

  The masks are None where the call has no segments.
  """

  q: jax.Array  # [B, HV, C, K]
  k: jax.Array  # [B, HV, C, K]
  v: jax.Array  # [B, HV, C, V]
  beta: jax.Array  # [B, HV, C, 1]
  same: jax.Array | None  # [B, 1, C, C]: both tokens in one segment
  entry: jax.Array | None  # [B, 1, C, 1]: the entering state reaches the token
  exit: jax.Array | None  # [B, 1, C, 1]: the token reaches the leaving state
  keep: jax.Array | None  # [B, 1, 1, 1]: the state passes through


class _Residuals(NamedTuple):
  """What the backward pass reads."""

  q: jax.Array  # [B, T, H, K]
  k: jax.Array  # [B, T, H, K]
  v: jax.Array  # [B, T, HV, V]
  beta: jax.Array  # [B, T, HV]
  resets: jax.Array | None  # [B, T]
  states: jax.Array  # [N, B, HV, K, V]
  x: jax.Array  # [N, B, HV, C, V]
  error: jax.Array  # [N, B, HV, C, V]
  inverse: jax.Array  # [N, B, HV, C, C]


def _masked(x, mask):
  return x if mask is None else jnp.where(mask, x, 0)


def _slice(x, n, chunk):
  """Returns chunk n of [B, T, ...] as float32 [B, ..., C, last]."""
  x = jax.lax.dynamic_slice_in_dim(x, n * chunk, chunk, axis=1)
  return jnp.moveaxis(x, 1, 2).astype(jnp.float32)


def _update(whole, x, n):
  """Writes [B, HV, C, ...] into chunk n of [B, T, HV, ...]."""
  x = jnp.moveaxis(x, 2, 1).astype(whole.dtype)
  return jax.lax.dynamic_update_slice_in_dim(whole, x, n * x.shape[1], axis=1)


def _segment_masks(resets, n, chunk):
  if resets is None:
    return None, None, None, None
  count = jax.lax.dynamic_slice_in_dim(resets, n * chunk, chunk, axis=1)
  before = jax.lax.dynamic_slice_in_dim(
    resets, jnp.maximum(n * chunk - 1, 0), 1, axis=1
  )
  before = jnp.where(n == 0, 0, before)  # [B, 1]
  count = count[:, None]  # [B, 1, C]
  last = count[..., -1:]
  return (
    count[..., :, None] == count[..., None, :],
    (count == before[:, None])[..., None],
    (count == last)[..., None],
    (last == before[:, None])[..., None],
  )


def _load(q, k, v, beta, resets, n, chunk) -> _Chunk:
  group = v.shape[2] // q.shape[2]
  q, k = (jnp.repeat(_slice(x, n, chunk), group, axis=1) for x in (q, k))
  return _Chunk(
    q,
    k,
    _slice(v, n, chunk),
    _slice(beta[..., None], n, chunk),
    *_segment_masks(resets, n, chunk),
  )


def _pair_mask(c: _Chunk, offset: int):
  size = c.q.shape[2]
  lower = jnp.tri(size, k=offset, dtype=bool)[None, None]
  return lower if c.same is None else lower & c.same


def _forward_chunk(c: _Chunk, state, static: _Static):
  """Returns (o, leaving state, X, E, inverse) of one chunk."""
  dot = functools.partial(jnp.einsum, precision=static.precision)
  gram = jnp.where(_pair_mask(c, -1), dot('bhik,bhjk->bhij', c.k, c.k), 0)
  inverse = triangular_inverse.unit_lower_inverse(c.beta * gram)
  entry_k, entry_q = _masked(c.k, c.entry), _masked(c.q, c.entry)
  fresh = c.v - dot('bhik,bhkv->bhiv', entry_k, state)
  x = dot('bhij,bhjv->bhiv', inverse, c.beta * fresh)
  error = fresh - dot('bhij,bhjv->bhiv', gram, x)
  p = jnp.where(_pair_mask(c, 0), dot('bhik,bhjk->bhij', c.q, c.k), 0)
  o = dot('bhik,bhkv->bhiv', entry_q, state) + dot('bhij,bhjv->bhiv', p, x)
  write = dot('bhik,bhiv->bhkv', _masked(c.k, c.exit), x)
  return static.scale * o, _masked(state, c.keep) + write, x, error, inverse


def _backward_chunk(
  c: _Chunk, state, x, error, inverse, do, dstate, static: _Static
):
  """Returns (dq, dk, dv, dbeta, gradient of the entering state)."""
  dot = functools.partial(jnp.einsum, precision=static.precision)
  do = static.scale * do
  lower, strict = _pair_mask(c, 0), _pair_mask(c, -1)
  p = jnp.where(lower, dot('bhik,bhjk->bhij', c.q, c.k), 0)
  dx = dot('bhij,bhiv->bhjv', p, do)
  dx += dot('bhik,bhkv->bhiv', _masked(c.k, c.exit), dstate)
  dr = dot('bhij,bhiv->bhjv', inverse, dx)
  dv = c.beta * dr
  dp = jnp.where(lower, dot('bhiv,bhjv->bhij', do, x), 0)
  dgram = jnp.where(strict, -dot('bhiv,bhjv->bhij', dv, x), 0)

  dq = dot('bhij,bhjk->bhik', dp, c.k)
  dq += _masked(dot('bhiv,bhkv->bhik', do, state), c.entry)
  dk = dot('bhij,bhik->bhjk', dp, c.q)
  dk += dot('bhij,bhjk->bhik', dgram + jnp.swapaxes(dgram, -1, -2), c.k)
  dk -= _masked(dot('bhiv,bhkv->bhik', dv, state), c.entry)
  dk += _masked(dot('bhiv,bhkv->bhik', x, dstate), c.exit)
  dbeta = jnp.sum(dr * error, axis=-1)

  entry_k, entry_q = _masked(c.k, c.entry), _masked(c.q, c.entry)
  dentry = _masked(dstate, c.keep) + dot('bhik,bhiv->bhkv', entry_q, do)
  dentry -= dot('bhik,bhiv->bhkv', entry_k, dv)
  return dq, dk, dv, dbeta, dentry


def _forward(static, q, k, v, beta, initial_state, resets):
  """Returns ((o, final_state), residuals) for T a multiple of the chunk."""

  def step(carry, n):
    state, o = carry
    c = _load(q, k, v, beta, resets, n, static.chunk)
    o_n, new, x, error, inverse = _forward_chunk(c, state, static)
    return (new, _update(o, o_n, n)), (state, x, error, inverse)

  chunks = jnp.arange(q.shape[1] // static.chunk)
  carry = (initial_state, jnp.zeros_like(v))
  (state, o), saved = jax.lax.scan(step, carry, chunks)
  return (o, state), _Residuals(q, k, v, beta, resets, *saved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, q, k, v, beta, initial_state, resets):
  return _forward(static, q, k, v, beta, initial_state, resets)[0]


def _group_sum(x, heads):
  """Sums [B, HV, C, K] over each group of value heads to [B, H, C, K]."""
  return x.reshape(x.shape[0], heads, -1, *x.shape[2:]).sum(2)


def _backward(static, residuals: _Residuals, cotangents):
  do, dfinal = cotangents
  q, k, v, beta, resets, *saved = residuals
  heads = q.shape[2]

  def step(carry, xs):
    dstate, dq, dk, dv, dbeta = carry
    n, saved_n = xs
    c = _load(q, k, v, beta, resets, n, static.chunk)
    do_n = _slice(do, n, static.chunk)
    dq_n, dk_n, dv_n, dbeta_n, dstate = _backward_chunk(
      c, *saved_n, do_n, dstate, static
    )
    dq = _update(dq, _group_sum(dq_n, heads), n)
    dk = _update(dk, _group_sum(dk_n, heads), n)
    dv, dbeta = _update(dv, dv_n, n), _update(dbeta, dbeta_n, n)
    return (dstate, dq, dk, dv, dbeta), None

  chunks = jnp.arange(q.shape[1] // static.chunk)
  carry = (dfinal, *(jnp.zeros_like(a) for a in (q, k, v, beta)))
  carry, _ = jax.lax.scan(step, carry, (chunks, tuple(saved)), reverse=True)
  dstate, dq, dk, dv, dbeta = carry
  return dq, dk, dv, dbeta, dstate, None


_chunked.defvjp(_forward, _backward)


def _count_resets(segment_ids):
  """Returns (resets so far [B, T], token is not padding [B, T])."""
  valid = segment_ids != 0
  position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]  # [1, T]
  last = jax.lax.cummax(jnp.where(valid, position, -1), axis=1)
  before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
  reset = valid & (before >= 0) & (previous_id != segment_ids)
  return jnp.cumsum(reset, axis=1, dtype=jnp.int32), valid


def _default_chunk(q, v) -> int:
  # The rounding of float32 inputs adds up over a chunk: in chunks of 64 with
  # nearly parallel keys it passes 1e-5, for no speed to speak of.
  is_small = max(q.shape[-1], v.shape[-1]) <= 64
  return 32 if is_small or q.dtype == jnp.float32 else 64


def delta_rule(
  q, k, v, beta, g, *, scale, initial_state, segment_ids, chunk_size=None
):
  """Runs the chunkwise form; see `api.delta_rule`.

  Raises:
    NotImplementedError: a decay is given, or the dtype is float64.
  """
  if g is not None:
    raise NotImplementedError('it has no decay (g must be None)')
  if q.dtype == jnp.float64:
    raise NotImplementedError('it computes in float32, got float64 inputs')
  length = q.shape[1]
  chunk = chunk_size or _default_chunk(q, v)
  chunk = min(chunk, length)
  resets = None
  if segment_ids is not None:
    resets, valid = _count_resets(segment_ids)
    q, k, v = (jnp.where(valid[..., None, None], x, 0) for x in (q, k, v))
    beta = jnp.where(valid[..., None], beta, 0)
  tail = -length % chunk
  if tail:
    # Zero keys, values and strengths leave the state alone.
    q, k, v, beta = (
      jnp.pad(x, ((0, 0), (0, tail)) + ((0, 0),) * (x.ndim - 2))
      for x in (q, k, v, beta)
    )
    if resets is not None:
      resets = jnp.pad(resets, ((0, 0), (0, tail)), mode='edge')
  # Products of 16-bit inputs are exact in TF32; those of float32 are not.
  precision = _HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
  static = _Static(float(scale), chunk, precision)
  o, state = _chunked(static, q, k, v, beta, initial_state, resets)
  return o[:, :length], state
