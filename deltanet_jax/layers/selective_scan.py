"""The selective scan of S6 in chunks: no array over [B, T, D, N].

    h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t^T        h_t in R^{D x N}
    y_t = h_t C_t

(Gu and Dao, arXiv 2312.00752, algorithm 2). Decays of every channel and state
differ, so that there is no form by matrix products. A chunk of tokens is an
associative scan over [B, C, D, N], for C tokens; the chunks are a scan, which
keeps the state between them alone: the backward pass computes a chunk again
where it needs it. Memory: [B, T / C, D, N] and a chunk's scan.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

CHUNK_SIZE = 16


def _then(left, right):
  """Composes h -> a h + b with what follows it."""
  return right[0] * left[0], right[0] * left[1] + right[1]


def advance(
  state: jax.Array, decay: jax.Array, write: jax.Array, keep: jax.Array
) -> jax.Array:
  """Returns the states [C, B, D, N] after each token of a chunk.

  Args:
    state: before the chunk [B, D, N].
    decay: [C, B, D, N].
    write: [C, B, D, N].
    keep: bool [C, B]; False: the state is zero before the token.
  """
  decay = jnp.where(keep[..., None, None], decay, 0)
  decays, writes = jax.lax.associative_scan(_then, (decay, write), axis=0)
  return decays * state[None] + writes


def _remembering_arguments(function, *arguments):
  """Returns `function`, whose backward pass starts from its arguments.

  A nested `jax.checkpoint` would not do: where one around it has a policy that
  saves what is not named, that policy decides inside too.

  Args:
    function: may close over arrays.
    *arguments: like those it will be called with.
  """
  function, closed_over = jax.closure_convert(function, *arguments)

  @jax.custom_vjp
  def run(*arguments):
    return function(*arguments)

  def forward(*arguments):
    return function(*arguments), arguments

  def backward(arguments, cotangents):
    return jax.vjp(function, *arguments)[1](cotangents)

  run.defvjp(forward, backward)
  return lambda *arguments: run(*arguments, *closed_over)


def scan_in_chunks(
  chunk: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]],
  state: jax.Array,
  tokens: Any,
  resets: jax.Array | None,
  chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Scans a function over the chunks of a sequence, remembering states alone.

  It has derivatives in reverse mode only.

  Args:
    chunk: maps (state, (tokens [C, B, ...], keep [C, B])) to (state, y [C, B,
      ...]); zeros for tokens have to leave the state alone.
    state: the first one.
    tokens: arrays [B, T, ...].
    resets: bool [B, T]: the state is zero before the token; None: nowhere.
    chunk_size: tokens per chunk; 0: 16.

  Returns:
    y [B, T, ...] in float32 and the last state.
  """
  batch, length = jax.tree.leaves(tokens)[0].shape[:2]
  size = min(chunk_size or CHUNK_SIZE, length)
  if resets is None:
    resets = jnp.zeros((batch, length), bool)

  def in_chunks(x):
    x = jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * (x.ndim - 2)))
    x = jnp.moveaxis(x, 1, 0)
    return x.reshape(-1, size, *x.shape[1:])  # [T / C, C, B, ...]

  chunks = (jax.tree.map(in_chunks, tokens), ~in_chunks(resets))
  first = jax.tree.map(lambda x: x[0], chunks)
  body = _remembering_arguments(chunk, state, first)
  state, y = jax.lax.scan(body, state, chunks)
  y = y.reshape(-1, *y.shape[2:])[:length]
  return jnp.moveaxis(y, 0, 1), state


def selective_scan(
  u: jax.Array,
  dt: jax.Array,
  a: jax.Array,
  b: jax.Array,
  c: jax.Array,
  *,
  initial_state: jax.Array,
  resets: jax.Array | None = None,
  chunk_size: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Runs the recurrence over a sequence, in float32.

  Args:
    u: inputs [B, T, D].
    dt: step sizes [B, T, D], at least 0; 0 leaves the state alone.
    a: rates [D, N], below 0.
    b: [B, T, N].
    c: [B, T, N].
    initial_state: [B, D, N].
    resets: bool [B, T]: the state is zero before the token; None: nowhere.
    chunk_size: tokens per chunk; 0: 16.

  Returns:
    y [B, T, D] and the state after the last token [B, D, N].
  """
  a = a.astype(jnp.float32)

  def chunk(state, inputs):
    (u, dt, b, c), keep = inputs
    decay = jnp.exp(dt[..., None] * a[None, None])  # [C, B, D, N]
    write = (dt * u)[..., None] * b[..., None, :]
    states = advance(state, decay, write, keep)
    return states[-1], jnp.einsum('cbdn,cbn->cbd', states, c)

  tokens = tuple(x.astype(jnp.float32) for x in (u, dt, b, c))
  return scan_in_chunks(chunk, initial_state, tokens, resets, chunk_size)
