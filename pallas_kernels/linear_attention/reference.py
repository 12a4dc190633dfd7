"""Linear attention as a scan over tokens: the definition of the op."""

import jax
import jax.numpy as jnp


def linear_attention_step(q, k, v, g, bonus, *, state, scale):
  """Advances the state by a token; see `api.linear_attention_step`."""
  dtype = state.dtype
  group = v.shape[1] // q.shape[1]
  q, k = (jnp.repeat(x.astype(dtype), group, axis=1) for x in (q, k))
  write = k[..., None] * v.astype(dtype)[..., None, :]  # [B, HV, K, V]
  read = None
  if bonus is not None:
    read = state + bonus.astype(dtype)[None, :, :, None] * write
  if g is not None:
    decay = jnp.exp(g.astype(dtype))
    state = state * decay.reshape(*decay.shape[:2], -1, 1)  # [B, HV, K or 1, 1]
  state = state + write
  read = state if read is None else read
  precision = jax.lax.Precision.HIGHEST
  o = scale * jnp.einsum('bhk,bhkv->bhv', q, read, precision=precision)
  return o.astype(v.dtype), state


def linear_attention(
  q, k, v, g, bonus, *, scale, initial_state, segment_ids, chunk_size=None
):
  """Runs `linear_attention_step` over T; see `api.linear_attention`."""
  del chunk_size  # Tokens are taken one by one.
  if segment_ids is None:
    segment_ids = jnp.ones(q.shape[:2], jnp.int32)

  def step(carry, token):
    state, last_id = carry  # [B, HV, K, V], [B]
    segment_id, inputs = token
    valid = segment_id != 0
    # Zeros leave the state alone and read 0, whatever stands at padding.
    inputs = jax.tree.map(
      lambda x: jnp.where(valid.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), inputs
    )
    reset = valid & (last_id != 0) & (segment_id != last_id)
    state = jnp.where(reset[:, None, None, None], 0, state)
    o, state = linear_attention_step(*inputs, bonus, state=state, scale=scale)
    return (state, jnp.where(valid, segment_id, last_id)), o

  tokens = jax.tree.map(
    lambda x: jnp.moveaxis(x, 1, 0), (segment_ids, (q, k, v, g))
  )
  carry = (initial_state, jnp.zeros_like(segment_ids[:, 0]))
  (state, _), o = jax.lax.scan(step, carry, tokens)
  return jnp.moveaxis(o, 0, 1), state
