"""The selective scan of S6 in chunks: no array over [B, T, D, N].

    h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t^T        h_t in R^{D x N}
    y_t = h_t C_t

(Gu and Dao, arXiv 2312.00752, algorithm 2). Decays of every channel and state
differ, so that there is no form by matrix products. A chunk of tokens is an
associative scan over [B, C, D, N], for C tokens; the chunks are a scan, which
keeps the state between them alone: the backward pass computes a chunk again
where it needs it. Memory: [B, T / C, D, N] and a chunk's scan.
"""

import functools

import jax
import jax.numpy as jnp

CHUNK_SIZE = 16


def _then(left, right):
  """Composes h -> a h + b with what follows it."""
  return right[0] * left[0], right[0] * left[1] + right[1]


@functools.partial(jax.checkpoint, prevent_cse=False)
def _chunk(a, state, tokens):
  """Advances state [B, D, N] by the tokens of a chunk; returns y [C, B, D]."""
  u, dt, b, c, keep = tokens
  decay = jnp.exp(dt[..., None] * a[None, None])  # [C, B, D, N]
  decay = jnp.where(keep[..., None, None], decay, 0)
  write = (dt * u)[..., None] * b[..., None, :]
  decays, writes = jax.lax.associative_scan(_then, (decay, write), axis=0)
  states = decays * state[None] + writes
  return states[-1], jnp.einsum('cbdn,cbn->cbd', states, c)


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
  batch, length, _ = u.shape
  size = min(chunk_size or CHUNK_SIZE, length)
  if resets is None:
    resets = jnp.zeros((batch, length), bool)
  padding = -length % size

  def in_chunks(x):
    x = x if x.dtype == bool else x.astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
    x = jnp.moveaxis(x, 1, 0)
    return x.reshape(-1, size, *x.shape[1:])  # [T / C, C, B, ...]

  # A step size of 0 where it was padded: the state stays.
  tokens = jax.tree.map(in_chunks, (u, dt, b, c))
  keep = ~in_chunks(resets)
  state, y = jax.lax.scan(
    functools.partial(_chunk, a.astype(jnp.float32)),
    initial_state,
    (*tokens, keep),
  )
  y = y.reshape(-1, *y.shape[2:])[:length]
  return jnp.moveaxis(y, 0, 1), state
