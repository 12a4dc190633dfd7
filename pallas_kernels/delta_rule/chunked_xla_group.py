"""The delta rule over a group of chunks in plain XLA, and its gradient.

Inside a chunk of C tokens with queries Q, keys K, values V, strengths b and
the state S that enters it, the recurrence of `api.delta_rule` has the closed
form (UT transform; equations 8 to 11 of the paper, there transposed)

    G = strict_tril(K K^T . D)       E = (I + G b)^-1 (V - K_in S)
    P = scale * tril(Q K^T . D)      X = b E
    O = Q_in S + P X                 S' = keep S + K_out^T X

with the decays D, K_in = entry K, K_out = exit K, Q_in = scale entry Q of
`pallas_kernels.decay`; without decay and resets all of them are 1. E are the
errors that the delta rule corrects, X the values that it writes. The gradient
needs no derivative of the inverse. With dO and dS' given,

    dX = P^T dO + K_out dS'          dV = (I + G b)^-T b dX
    db = rowsum(dV E) / b
    dP = dO X^T                      dG = -dV X^T
    dQ_in = dO S^T                   dK_in = -dV S^T
    dK_out = X dS'^T                 dkeep = rowsum(S dS')
    dS = keep dS' + Q_in^T dO - K_in^T dV,

and these go back to q, k and g through what made G, P, Q_in, K_in and K_out.
In the inverse and where it is divided by, a strength of 0 is 2^-60: too little
to be seen, and dV / b is the gradient of b E that it should be. Saved for the
backward pass are the state that enters the group, from which X finds those that
enter its chunks by one product each, X with such strengths, and the inverse.

Where devices share a row, K columns more go through the chunks, from the state
I and with V = 0: the `Reach` of the state that enters a device's part.

With n keys per token (`delta_product`), k, v and beta have n entries per token
and g is zero but at the first of them; each query reads after the last.

For float32 inputs G, its inverse and the products with it are computed in
float64, and E, X and dV are rounded. Where keys are nearly parallel and beta is
near 2, sums over X cancel to a fraction of their terms, and whatever of these
were rounded beforehand would cost several times the error of the scan over
tokens. The inverse is saved as two float32 parts, each a triangle of one array.
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


class Static(NamedTuple):
  """What is fixed at trace time."""

  scale: float
  layout: chunking.Layout
  keys_per_token: int


class Inputs(NamedTuple):
  """Padded to whole groups; n keys per token, T = n times the tokens.

  In chunks they are float32 of M chunks and N = B HV heads.
  """

  q: jax.Array  # [B, T / n, H, K]; [M, N, C / n, K]
  k: jax.Array  # [B, T, H, K]; [M, N, C, K]
  v: jax.Array  # [B, T, HV, V]; [M, N, C, V]
  beta: jax.Array  # [B, T, HV]; [M, N, C, 1]
  g: jax.Array | None  # [B, T, HV, 1 or K]; [M, N, C, 1 or K]


class Solved(NamedTuple):
  """What the backward pass reads of a group, beside the inputs."""

  state: jax.Array  # [1, N, K, V], entering the group
  x: jax.Array  # [M, N, C, V], of strengths that are not 0
  inverse: jax.Array  # [M, N, C, C], see `_packed`


class Reach(NamedTuple):
  """What a group has of a state S_in that enters before it, divided by S_in."""

  state: jax.Array  # [1, N, K, K], entering the group
  x: jax.Array  # [M, N, C, K]
  o: jax.Array  # [M, N, C / n, K]


class _Decays(NamedTuple):
  """Decays per head of a group; None stands for 1."""

  pair: jax.Array | None  # [M, N, C, C], in the dtype of what is solved
  passage: decay.Passage


class _Pairs(NamedTuple):
  """Products of all pairs of tokens of a chunk, without decay or mask."""

  gram: jax.Array  # [M, N, C, C]
  p: jax.Array  # [M, N, C / n, C]


class _Prepared(NamedTuple):
  """What a group's keys, queries and decays come to."""

  gram: jax.Array | None  # [M, N, C, C]; None: only its inverse is used
  p: jax.Array  # [M, N, C / n, C]
  q_in: jax.Array  # [M, N, C / n, K]
  k_in: jax.Array  # [M, N, C, K]
  k_out: jax.Array  # [M, N, C, K]
  keep: jax.Array | None  # [M, N, 1 or K, 1]


def _per_channel(g) -> bool:
  return g is not None and g.shape[-1] > 1


def _strength(beta):
  """Returns beta, of at least 2^-60."""
  return jnp.where(jnp.abs(beta) < _LEAST, _LEAST, beta)


def _written(x, beta):
  """Returns the values that are written, from those that are saved."""
  return beta / _strength(beta) * x


def _decays(g, cut, dtype) -> _Decays | None:
  """Returns the decays of g, or None where g is per channel."""
  if _per_channel(g):
    return None
  if g is None:
    return _Decays(None, decay.passage(None, cut))
  g = g.astype(dtype)
  pair = jax.lax.optimization_barrier(decay.pair_decay(g))
  factors = jax.tree.map(lambda x: x.astype(jnp.float32), decay.passage(g, cut))
  return _Decays(pair, factors)


def _pairs(to_gram, to_p, columns, dtype) -> _Pairs:
  to_gram, to_p, columns = (x.astype(dtype) for x in (to_gram, to_p, columns))
  return _Pairs(chunking.outer(to_gram, columns), chunking.outer(to_p, columns))


def _prepare(
  q, k, g, cut, decays, static: Static, *, known: _Pairs | None, has_gram: bool
) -> _Prepared:
  """q, k, g are of a group, in chunks; `known` are the pairs of q and k."""
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
  gram, (known_gram, known_p) = None, known or (None, None)
  if has_gram:
    gram = decay.scores(k, k, g, cut, strict=True, pair=pair, known=known_gram)
  return _Prepared(
    gram,
    decay.scores(q, k, g, cut, stride=stride, pair=pair, known=known_p),
    decay.scaled(q, entry_q),
    decay.scaled(k, factors.entry),
    decay.scaled(k, factors.exit),
    factors.keep,
  )


def _invert(inputs: Inputs, cut, decays, dtype):
  """Returns (I + G b)^-1, computed in `dtype`."""
  k, g, beta = jax.tree.map(
    lambda x: x.astype(dtype), (inputs.k, inputs.g, inputs.beta)
  )
  pair = None if decays is None else decays.pair
  gram = decay.scores(k, k, g, cut, strict=True, pair=pair)
  strength = jnp.swapaxes(_strength(beta), -1, -2)
  return triangular_inverse.unit_lower_inverse(gram * strength, exact=False)


def _packed(inverse):
  """Returns a lower unit triangular matrix in float32 [..., C, C].

  On and above the diagonal is its transpose, below it, of float64, what that
  leaves for a second float32.
  """
  upper = jnp.swapaxes(inverse, -1, -2)
  high = upper.astype(jnp.float32)
  if inverse.dtype == jnp.float32:
    return high
  low = inverse - jnp.swapaxes(high, -1, -2).astype(inverse.dtype)
  return jnp.triu(high) + jnp.tril(low.astype(jnp.float32), -1)


def _unpacked_transpose(packed, dtype):
  """Returns the transpose of what was `_packed`, in its dtype."""
  if dtype == jnp.float32:
    return packed
  low = jnp.swapaxes(jnp.tril(packed, -1), -1, -2)
  return jnp.triu(packed).astype(dtype) + low.astype(dtype)


def _next_state(state, made: _Prepared, k_out_t, written, m: int):
  """Takes the state through chunk m, whose values `written` are."""
  keep = None if made.keep is None else made.keep[m]
  state = decay.scaled(state, keep) + k_out_t[m] @ written
  return jax.lax.optimization_barrier(state)


def _states(state, made: _Prepared, written):
  """Returns the states that enter the chunks of a group, from the first."""
  k_out_t = chunking.transpose(made.k_out)
  states = [state]
  for m in range(written.shape[0] - 1):
    states.append(_next_state(states[-1], made, k_out_t, written[m], m))
  return jnp.stack(states)


def _reach(state, made: _Prepared, inverse, beta, dtype):
  """Takes a state of `Reach` through the chunks of a group.

  A strength of 0 writes 2^-60 here, too little to be seen.

  Returns:
    the state after the group and the `Reach`.
  """
  k_out_t = chunking.transpose(made.k_out)
  solve = -_strength(beta).astype(dtype) * inverse
  entering, xs, os = state, [], []
  for m in range(beta.shape[0]):
    x = solve[m] @ (made.k_in[m] @ state).astype(dtype)
    xs.append(x.astype(jnp.float32))
    os.append(made.q_in[m] @ state + made.p[m] @ xs[m])
    state = _next_state(state, made, k_out_t, xs[m], m)
  return state[None], Reach(entering[None], *map(jnp.stack, (xs, os)))


def write(states, inputs: Inputs, cut, *, static: Static, dtype):
  """Takes the states through the chunks of a group; solves in `dtype`.

  Args:
    states: [1, N, K, V], and that of `Reach` [1, N, K, K] or None.
    inputs: of the group.
    cut: its segments.
    static: what is fixed.
    dtype: of what is solved.

  Returns:
    the states after the group, O, what the backward pass reads, and the `Reach`
    or None.
  """
  decays = _decays(inputs.g, cut, dtype)
  q, k, g = inputs.q, inputs.k, inputs.g
  made = _prepare(q, k, g, cut, decays, static, known=None, has_gram=False)
  inverse = _invert(inputs, cut, decays, dtype)
  k_out_t = chunking.transpose(made.k_out)
  strength = _strength(inputs.beta).astype(dtype)
  (entering, reach), found = states, None
  state, states, saved = entering[0], [], []
  for m, v in enumerate(inputs.v):
    fresh = v - made.k_in[m] @ state
    error = inverse[m] @ fresh.astype(dtype)
    x = (strength[m] * error).astype(jnp.float32)
    states.append(state)
    saved.append(x)
    written = _written(x, inputs.beta[m])
    state = _next_state(state, made, k_out_t, written, m)
  states, x = map(jnp.stack, (states, saved))
  o = made.q_in @ states + made.p @ _written(x, inputs.beta)
  if reach is not None:
    reach, found = _reach(reach[0], made, inverse, inputs.beta, dtype)
  solved = Solved(entering, x, _packed(inverse))
  return (state[None], reach), o, solved, found


def _read(dstate, made, beta, inverse, dx_o, read, dtype):
  """Takes dS' back through the chunks of a group; solves in `dtype`.

  Returns:
    dS before the group, dV and dS' of every chunk.
  """
  strength = _strength(beta).astype(dtype)
  inverse_t = _unpacked_transpose(inverse, dtype)
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


def _cotangents(made: _Prepared, dpairs, do, dv, x, states, dstates):
  """Returns the gradients of what `_prepare` made, as it made it."""
  dkeep = None
  if made.keep is not None:
    dkeep = chunking.sum_to(states * dstates, made.keep.shape)
  return _Prepared(
    dpairs.gram.astype(jnp.float32),
    dpairs.p.astype(jnp.float32),
    chunking.outer(do, states),
    -chunking.outer(dv, states),
    chunking.outer(x, dstates),
    dkeep,
  )


def _row_sums(x, y):
  return jnp.sum(x * y, axis=-1, keepdims=True)


def _dg(cut, pair, made, back, pairs, dpairs, static: Static, dtype):
  """Returns dg of decays per head; `back` are the gradients of `made`.

  A log-decay's gradient sums what crosses its token: pairs of a write before
  and a read after it, the entering state on its way to reads after it, writes
  before it on their way to the leaving state, and what passes through. For
  aligned keys the pairs cancel as the sums over X do.
  """
  stride = static.keys_per_token
  entered = _row_sums(made.k_in, back.k_in)
  reads = _row_sums(made.q_in, back.q_in)
  entered += decay.with_gaps(reads[..., 0], stride)[..., None]
  left = _row_sums(made.k_out, back.k_out)
  wide = (entered, left, made.keep * back.keep)
  entered, left, passed = (a.astype(dtype) for a in wide)
  if cut is not None:
    pair = jnp.where(cut.same, pair, 0)
  read = dpairs.p * pairs.p * pair[..., stride - 1 :: stride, :]
  crossing = decay.crossings(read, stride)
  crossing += decay.crossings(dpairs.gram * pairs.gram * pair)
  from_here = jnp.triu(jnp.ones(pair.shape[-2:], dtype))
  return crossing + passed + from_here @ entered + (1 - from_here) @ left


def take_back(dstate, inputs, solved, do, cut, *, static: Static, dtype):
  """Takes the gradients back through a group; solves in `dtype`.

  Returns:
    dS before the group and the gradients of the inputs.
  """
  q, k, g = inputs.q, inputs.k, inputs.g
  decays = _decays(g, cut, dtype)
  pairs, has_decay = None, g is not None and not _per_channel(g)
  if has_decay:
    pairs = _pairs(k, static.scale * q.astype(dtype), k, dtype)
  made, pullback = jax.vjp(
    lambda *x: _prepare(*x, cut, decays, static, known=pairs, has_gram=True),
    *(q, k, g),
  )
  p_t, q_in_t = map(chunking.transpose, (made.p, made.q_in))
  dstate, dv, dstates = _read(
    dstate[0],
    made,
    inputs.beta,
    solved.inverse,
    p_t @ do,
    q_in_t @ do,
    dtype,
  )
  x = _written(solved.x, inputs.beta)
  dpairs = _pairs(-dv, do, x, dtype if has_decay else jnp.float32)
  states = _states(solved.state[0], made, x)
  back = _cotangents(made, dpairs, do, dv, x, states, dstates)
  dq, dk, dg = pullback(back)
  if has_decay:
    dg = _dg(cut, decays.pair, made, back, pairs, dpairs, static, dtype)
  strength = _strength(inputs.beta)
  dbeta = _row_sums(dv / strength, solved.x / strength)
  gradients = Inputs(dq, dk, dv, dbeta, dg)
  gradients = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
  return dstate[None], gradients


def for_inputs(function, static: Static, dtype):
  """Returns `write` or `take_back` for inputs of a dtype, solving as it needs.

  Where that is in float64, JAX's settings do not matter.
  """
  if dtype != jnp.float32:
    return functools.partial(function, static=static, dtype=jnp.float32)

  def exactly(*arguments):
    with jax.default_matmul_precision('highest'):
      return function(*arguments, static=static, dtype=jnp.float64)

  return chunking.with_float64(exactly)
