"""The recurrence as a scan over tokens: the definition of the op."""

import jax
import jax.numpy as jnp


def diagonal_plus_low_rank_step(q, k, v, a, b, g, *, state, scale):
  """Advances the state [B, HV, K, V] by a token; see `api`."""
  dtype = state.dtype
  group = v.shape[1] // q.shape[1]
  q, k, a, b = (
    jnp.repeat(x.astype(dtype), group, axis=1) for x in (q, k, a, b)
  )
  precision = jax.lax.Precision.HIGHEST
  u = jnp.einsum('bhk,bhkv->bhv', b, state, precision=precision)
  if g is not None:
    decay = jnp.exp(g.astype(dtype))
    state = state * decay.reshape(*decay.shape[:2], -1, 1)  # [B, HV, K or 1, 1]
  written = k[..., None] * v.astype(dtype)[..., None, :]
  state = state + (a[..., None] * u[..., None, :] + written)
  o = scale * jnp.einsum('bhk,bhkv->bhv', q, state, precision=precision)
  return o.astype(v.dtype), state


def diagonal_plus_low_rank(
  q, k, v, a, b, g, *, scale, initial_state, segment_ids, chunk_size=None
):
  """Runs `diagonal_plus_low_rank_step` over T; see `api`."""
  del chunk_size  # Tokens are taken one by one.
  if segment_ids is None:
    segment_ids = jnp.ones(q.shape[:2], jnp.int32)

  def step(carry, token):
    state, last_id = carry  # [B, HV, K, V], [B]
    segment_id, inputs = token
    valid = segment_id != 0
    # Zeros, or a NaN at padding would reach the gradients of the other tokens.
    inputs = jax.tree.map(
      lambda x: jnp.where(valid.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), inputs
    )
    reset = valid & (last_id != 0) & (segment_id != last_id)
    entering = jnp.where(reset[:, None, None, None], 0, state)
    o, new = diagonal_plus_low_rank_step(*inputs, state=entering, scale=scale)
    o = jnp.where(valid[:, None, None], o, 0)
    state = jnp.where(valid[:, None, None, None], new, state)
    return (state, jnp.where(valid, segment_id, last_id)), o

  tokens = jax.tree.map(
    lambda x: jnp.moveaxis(x, 1, 0), (segment_ids, (q, k, v, a, b, g))
  )
  carry = (initial_state, jnp.zeros_like(segment_ids[:, 0]))
  (state, _), o = jax.lax.scan(step, carry, tokens)
  return jnp.moveaxis(o, 0, 1), state
