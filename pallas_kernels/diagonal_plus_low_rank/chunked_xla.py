"""The recurrence chunk by chunk in plain XLA, with its own VJP.

Inside a chunk of C tokens with the rows Q, K, V, A, B and the state S that
enters it, let U hold what B reads: u_t = S_{t-1}^T b_t. With the decays D,
entry, exit and keep of `pallas_kernels.decay`, and D' and entry' the same up to
the token before (b_t reads the state before its own token's decay), the
recurrence of `api.diagonal_plus_low_rank` has the closed form

    L_a = strict_tril(B A^T . D')    L_k = strict_tril(B K^T . D')
    P_a = scale * tril(Q A^T . D)    P_k = scale * tril(Q K^T . D)
    U = (I - L_a)^-1 (B_in S + L_k V)
    O = Q_in S + P_a U + P_k V       S' = keep S + A_out^T U + K_out^T V

with B_in = entry' B, Q_in = scale entry Q, A_out = exit A, K_out = exit K. The
gradient needs no derivative of the inverse. With dO and dS' given,

    dU = P_a^T dO + A_out dS'        dR = (I - L_a)^-T dU
    dV = P_k^T dO + K_out dS' + L_k^T dR
    dL_a = dR U^T      dL_k = dR V^T      dB_in = dR S^T
    dP_a = dO U^T      dP_k = dO V^T      dQ_in = dO S^T
    dA_out = U dS'^T   dK_out = V dS'^T   dkeep = rowsum(S dS')
    dS = keep dS' + Q_in^T dO + B_in^T dR,

and these go back to q, k, a, b and g through what made L, P and the rest.
Saved for the backward pass are U, the inverse and the state that enters the
group of chunks, from which U and V find those that enter its chunks.

For float32 inputs L_a and the inverse are computed in float64 and then rounded:
where the rows of A and B are nearly parallel, sums over U cancel to a fraction
of their terms, and L_a rounded beforehand would cost several times the error of
the scan over tokens. So is dR, of which db takes the products with single rows
of V: where these nearly cancel, its rounding is most of their error. And dg of
a decay per head sums the gradients of all the scores that span a token, which
cancel likewise: the way back through L, P and the rest is then all in float64.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import chunking
from pallas_kernels import decay
from pallas_kernels import triangular_inverse


class _Static(NamedTuple):
  """What is fixed at trace time."""

  scale: float
  layout: chunking.Layout


class _Inputs(NamedTuple):
  """Padded to whole groups."""

  q: jax.Array  # [B, T, H, K]
  k: jax.Array  # [B, T, H, K]
  v: jax.Array  # [B, T, HV, V]
  a: jax.Array  # [B, T, H, K]
  b: jax.Array  # [B, T, H, K]
  g: jax.Array | None  # [B, T, HV, 1 or K]


class _Solved(NamedTuple):
  """What the backward pass reads of a group, beside the inputs."""

  state: jax.Array  # [B, HV, K, V], entering the group
  u: jax.Array  # [M, B, HV, C, V]
  inverse: jax.Array  # [M, B, HV, C, C]


class _Prepared(NamedTuple):
  """What all but the values of a group come to."""

  l_a: jax.Array  # [M, B, HV, C, C]
  l_k: jax.Array  # [M, B, HV, C, C]
  p_a: jax.Array  # [M, B, HV, C, C]
  p_k: jax.Array  # [M, B, HV, C, C]
  q_in: jax.Array  # [M, B, HV, C, K]
  b_in: jax.Array  # [M, B, HV, C, K]
  a_out: jax.Array  # [M, B, HV, C, K]
  k_out: jax.Array  # [M, B, HV, C, K]
  keep: jax.Array | None  # [M, B, HV, 1 or K, 1]


def _later(x):
  """Moves rows [..., C, N] to the next token; zeros come first."""
  pad = [(0, 0)] * (x.ndim - 2) + [(1, 0), (0, 0)]
  return jnp.pad(x[..., :-1, :], pad)


def _earlier(x):
  """Moves rows [..., C, N] to the token before; zeros come last."""
  pad = [(0, 0)] * (x.ndim - 2) + [(0, 1), (0, 0)]
  return jnp.pad(x[..., 1:, :], pad)


def _scores_before(x, y, g, cut):
  """Returns sum_k x_ik y_jk D'_ijk for j < i, else 0.

  They are the scores of the rows of x, each taken at the token before.
  """
  return _within(_later(decay.scores(_earlier(x), y, g, None)), cut)


def _within(found, cut):
  """Zeroes scores between tokens of different segments."""
  return found if cut is None else jnp.where(cut.same, found, 0)


def _all_scores(q, k, a, b, g, cut):
  """Returns L_a, L_k, P_a, P_k.

  They share the factors of D, so they are computed as one stack.
  """
  before = _earlier(b)
  rows, columns = jnp.stack([before, before, q, q]), jnp.stack([a, k, a, k])
  found = decay.scores(rows, columns, None if g is None else g[None], None)
  l_a, l_k, p_a, p_k = found
  return [_within(x, cut) for x in (_later(l_a), _later(l_k), p_a, p_k)]


def _prepare(q, k, a, b, g, cut, static: _Static) -> _Prepared:
  """Arrays are of a group, in chunks."""
  q = static.scale * q
  factors = decay.passage(g, cut)
  before = decay.passage(None if g is None else _later(g), cut)
  return _Prepared(
    *_all_scores(q, k, a, b, g, cut),
    decay.scaled(q, factors.entry),
    decay.scaled(b, before.entry),
    decay.scaled(a, factors.exit),
    decay.scaled(k, factors.exit),
    factors.keep,
  )


@chunking.in_float64
def _invert_exactly(a, b, g, cut):
  """Returns (I - L_a)^-1, by float64."""
  l_a = _scores_before(b, a, g, cut)
  return triangular_inverse.unit_lower_inverse(-l_a)


def _chunks(inputs: _Inputs, static: _Static) -> _Inputs:
  """Returns the inputs of a group in chunks."""
  chunks, heads = static.layout.chunks_per_group, inputs.v.shape[2]
  return jax.tree.map(lambda x: chunking.to_chunks(x, chunks, heads), inputs)


def _states(state, made: _Prepared, u, v):
  """Returns the states that enter the chunks of a group, from the first."""

  def step(state, xs):
    written, keep = xs
    return decay.scaled(state, keep) + written, state

  a_out_t, k_out_t = map(chunking.transpose, (made.a_out, made.k_out))
  written = a_out_t @ u + k_out_t @ v
  return chunking.scan_chunks(step, state, (written, made.keep))[1]


def _forward_group(entering, parts, saved, *, static: _Static):
  del saved
  inputs, counts = parts
  q, k, v, a, b, g = _chunks(inputs, static)
  cut = decay.segments(*counts, static.layout.chunks_per_group)
  made = _prepare(q, k, a, b, g, cut, static)
  if inputs.q.dtype == jnp.float32:
    inverse = _invert_exactly(a, b, g, cut)
  else:
    inverse = triangular_inverse.unit_lower_inverse(-made.l_a, exact=False)

  def step(state, xs):
    b_in, a_out_t, inverse, read, written, keep = xs
    u = inverse @ (b_in @ state + read)
    return decay.scaled(state, keep) + (a_out_t @ u + written), (state, u)

  a_out_t, k_out_t = map(chunking.transpose, (made.a_out, made.k_out))
  xs = (made.b_in, a_out_t, inverse, made.l_k @ v, k_out_t @ v, made.keep)
  state, (states, u) = chunking.scan_chunks(step, entering, xs)
  o = made.q_in @ states + (made.p_a @ u + made.p_k @ v)
  o = chunking.from_chunks(o, inputs.v)
  return state, o, _Solved(entering, u, inverse)


@chunking.in_float64
def _solve_exactly(inverse_t, du, a_out, dstate):
  """Returns dR, by float64."""
  return inverse_t @ (du + a_out @ dstate)


def _scan_back(dstate, do, made: _Prepared, solved: _Solved, *, exact: bool):
  """Returns dstate before the group, dR [..., C, V] and every chunk's dS'."""

  def step(dstate, xs):
    a_out, b_in_t, inverse_t, du, read, keep = xs
    if exact:
      dr = _solve_exactly(inverse_t, du, a_out, dstate)
    else:
      dr = inverse_t @ (du + a_out @ dstate)
    new = decay.scaled(dstate, keep) + (read + b_in_t @ dr)
    return new, (dr, dstate)

  q_in_t, b_in_t, p_a_t, inverse_t = map(
    chunking.transpose, (made.q_in, made.b_in, made.p_a, solved.inverse)
  )
  xs = (made.a_out, b_in_t, inverse_t, p_a_t @ do, q_in_t @ do, made.keep)
  dstate, (dr, dstates) = chunking.scan_chunks(step, dstate, xs, reverse=True)
  return dstate, dr, dstates


def _prepared_gradients(keep, v, do, dr, dstates, states, u) -> _Prepared:
  """Returns the gradients to what `_prepare` made of a group."""
  outer, dkeep = chunking.outer, None
  if keep is not None:
    dkeep = chunking.sum_to(states * dstates, keep.shape)
  return _Prepared(
    outer(dr, u),
    outer(dr, v),
    outer(do, u),
    outer(do, v),
    outer(do, states),
    outer(dr, states),
    outer(u, dstates),
    outer(v, dstates),
    dkeep,
  )


def _pull_back_exactly(arrays, cut, found, *, static: _Static):
  """Returns dq, dk, da, db and dg of a group, by float64."""

  def pull_back(arrays, cut, found):
    made, pullback = jax.vjp(
      lambda *arrays: _prepare(*arrays, cut, static), *arrays
    )
    return pullback(_prepared_gradients(made.keep, *found))

  return chunking.in_float64(pull_back)(arrays, cut, found)


def _backward_group(dstate, parts, solved: _Solved, *, static: _Static):
  inputs, counts, do = parts
  q, k, v, a, b, g = _chunks(inputs, static)
  heads = v.shape[2]
  do = chunking.to_chunks(do, static.layout.chunks_per_group, heads)
  cut = decay.segments(*counts, static.layout.chunks_per_group)
  arrays = q, k, a, b, g
  made, pullback = jax.vjp(
    lambda *arrays: _prepare(*arrays, cut, static), *arrays
  )
  exact = inputs.q.dtype == jnp.float32
  dstate, dr, dstates = _scan_back(dstate, do, made, solved, exact=exact)
  l_k_t, p_k_t = map(chunking.transpose, (made.l_k, made.p_k))
  dv = p_k_t @ do + made.k_out @ dstates + l_k_t @ dr
  states = _states(solved.state, made, solved.u, v)
  found = v, do, dr, dstates, states, solved.u
  if exact and g is not None and g.shape[-1] == 1:
    gradients = _pull_back_exactly(arrays, cut, found, static=static)
  else:
    gradients = pullback(_prepared_gradients(made.keep, *found))
  dq, dk, da, db, dg = gradients
  gradients = jax.tree.map(
    chunking.from_chunks,
    _Inputs(dq, dk, dv, da, db, dg),
    inputs,
  )
  return dstate, gradients, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(static, inputs, initial_state, counts):
  return _forward(static, inputs, initial_state, counts)[0]


def _forward(static, inputs, initial_state, counts):
  """Returns ((o, final_state), residuals)."""
  inputs, initial_state = chunking.first_order_only((inputs, initial_state))
  with jax.default_matmul_precision(chunking.precision_for(inputs.q.dtype)):
    state, o, solved = chunking.scan_groups(
      functools.partial(_forward_group, static=static),
      initial_state,
      (inputs, counts),
      groups=static.layout.groups,
    )
  return (o, state), (inputs, counts, solved)


def _backward(static, residuals, cotangents):
  residuals, cotangents = chunking.first_order_only((residuals, cotangents))
  inputs, counts, solved = residuals
  do, dfinal = cotangents
  with jax.default_matmul_precision(chunking.precision_for(inputs.q.dtype)):
    dstate, gradients, _ = chunking.scan_groups(
      functools.partial(_backward_group, static=static),
      dfinal,
      (inputs, counts, do),
      solved,
      groups=static.layout.groups,
      reverse=True,
    )
  return gradients, dstate, None


_chunked.defvjp(_forward, _backward)


def _default_chunk(q) -> int:
  # Sums over a chunk cancel where its writes overlap: where they are more than
  # there are dimensions. In chunks of 64 float32 would be less accurate, for no
  # speed to speak of.
  most = 16 if q.dtype == jnp.float32 else 64
  return max(1, min(q.shape[-1] // 2, most))


def diagonal_plus_low_rank(
  q, k, v, a, b, g, *, scale, initial_state, segment_ids, chunk_size=None
):
  """Runs the chunkwise form; see `api.diagonal_plus_low_rank`.

  Raises:
    NotImplementedError: the dtype is float64.
  """
  if q.dtype == jnp.float64:
    raise NotImplementedError('it computes in float32, got float64 inputs')
  length = q.shape[1]
  layout = chunking.layout(length, chunk_size or _default_chunk(q))
  if g is not None:
    g = g.reshape(*v.shape[:3], -1)
  inputs, counts = _Inputs(q, k, v, a, b, g), (None, None)
  if segment_ids is not None:
    resets, valid = decay.count_resets(segment_ids)
    inputs = jax.tree.map(lambda x: chunking.zero_where_not(x, valid), inputs)
    resets = chunking.pad_time(resets, layout.length, 'edge')
    counts = resets, decay.previous_resets(resets)
  # Rows of zeros without decay leave the state alone.
  inputs = jax.tree.map(lambda x: chunking.pad_time(x, layout.length), inputs)
  static = _Static(float(scale), layout)
  o, state = _chunked(static, inputs, initial_state, counts)
  return o[:, :length], state
