"""Bookkeeping of documents packed into one row.

Ids [B, T] are read as `pallas_kernels.delta_rule` reads them: 0 is padding,
and a new run starts at a token whose id differs from that of the last token
before it that is not padding. An id may return later as a new run.
"""

import jax
import jax.numpy as jnp


def forward_fill(segment_ids: jax.Array) -> jax.Array:
  """Replaces every 0 by the last id before it; leading zeros stay."""
  position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
  last = jax.lax.cummax(jnp.where(segment_ids != 0, position, 0), axis=1)
  return jnp.take_along_axis(segment_ids, last, axis=1)  # [B, T]


def run_numbers(segment_ids: jax.Array) -> jax.Array:
  """Numbers the runs of a row [B, T], so that no two share a number."""
  filled = forward_fill(segment_ids)
  starts = filled[:, 1:] != filled[:, :-1]
  starts = jnp.pad(starts, ((0, 0), (1, 0)))
  return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def resets(segment_ids: jax.Array) -> jax.Array:
  """Marks the tokens whose id differs from that of the last token before.

  Neither padding nor the first token of a row [B, T] is marked.
  """
  filled = forward_fill(segment_ids)
  before = jnp.pad(filled[:, :-1], ((0, 0), (1, 0)))
  return (segment_ids != 0) & (before != 0) & (segment_ids != before)


def first_id(segment_ids: jax.Array) -> jax.Array:
  """Returns each row's first id that is not padding, 0 if it has none."""
  first = jnp.argmax(segment_ids != 0, axis=1, keepdims=True)
  return jnp.take_along_axis(segment_ids, first, axis=1)[:, 0]


def last_id(segment_ids: jax.Array, previous: jax.Array) -> jax.Array:
  """Returns each row's last id that is not padding, else `previous` [B]."""
  ids = jnp.concatenate([previous[:, None], segment_ids], axis=1)
  return forward_fill(ids)[:, -1]


def continued_ids(previous: jax.Array, length: int) -> jax.Array:
  """Returns ids [B, length] that carry on the document `previous` [B].

  Where nothing came before (0), the document gets the id 1.
  """
  ids = jnp.where(previous == 0, 1, previous)
  return jnp.broadcast_to(ids[:, None], (ids.shape[0], length))
