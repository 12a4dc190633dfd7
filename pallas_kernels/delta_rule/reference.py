"""The delta rule as a scan over tokens: the definition of the ops."""

import jax
import jax.numpy as jnp


def delta_rule_step(q, k, v, beta, g, *, state, scale):
  """Advances the state [B, HV, K, V] by a token; see `api.delta_rule_step`."""
  dtype = state.dtype
  group = v.shape[1] // q.shape[1]
  q, k = (jnp.repeat(x.astype(dtype), group, axis=1) for x in (q, k))
  if g is not None:
    decay = jnp.exp(g.astype(dtype))
    state = state * decay.reshape(*decay.shape[:2], -1, 1)  # [B, HV, K or 1, 1]
  precision = jax.lax.Precision.HIGHEST
  old = jnp.einsum('bhk,bhkv->bhv', k, state, precision=precision)
  u = beta.astype(dtype)[..., None] * (v.astype(dtype) - old)
  state = state + k[..., None] * u[..., None, :]
  o = scale * jnp.einsum('bhk,bhkv->bhv', q, state, precision=precision)
  return o.astype(v.dtype), state


def delta_product_step(q, k, v, beta, g, *, state, scale):
  """Advances by a token of n keys; see `product_api.delta_product_step`."""
  for i in range(k.shape[1]):
    o, state = delta_rule_step(
      q,
      k[:, i],
      v[:, i],
      beta[:, i],
      g if i == 0 else None,
      state=state,
      scale=scale,
    )
  return o, state


def _scan(step, inputs, *, scale, initial_state, segment_ids):
  """Runs `step` over T for inputs q, k, v, beta, g, each [B, T, ...]."""
  if segment_ids is None:
    segment_ids = jnp.ones(inputs[0].shape[:2], jnp.int32)

  def body(carry, token):
    state, last_id = carry  # [B, HV, K, V], [B]
    segment_id, inputs = token
    valid = segment_id != 0
    # Zeros, or a NaN at padding would reach the gradients of the other tokens.
    inputs = jax.tree.map(
      lambda x: jnp.where(valid.reshape(-1, *(1,) * (x.ndim - 1)), x, 0), inputs
    )
    reset = valid & (last_id != 0) & (segment_id != last_id)
    entering = jnp.where(reset[:, None, None, None], 0, state)
    o, new = step(*inputs, state=entering, scale=scale)
    o = jnp.where(valid[:, None, None], o, 0)
    state = jnp.where(valid[:, None, None, None], new, state)
    return (state, jnp.where(valid, segment_id, last_id)), o

  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (segment_ids, inputs))
  carry = (initial_state, jnp.zeros_like(segment_ids[:, 0]))
  (state, _), o = jax.lax.scan(body, carry, tokens)
  return jnp.moveaxis(o, 0, 1), state


def delta_rule(
  q, k, v, beta, g, *, scale, initial_state, segment_ids, chunk_size=None
):
  """Runs `delta_rule_step` over T; see `api.delta_rule`."""
  del chunk_size  # Tokens are taken one by one.
  return _scan(
    delta_rule_step,
    (q, k, v, beta, g),
    scale=scale,
    initial_state=initial_state,
    segment_ids=segment_ids,
  )


def delta_product(
  q, k, v, beta, g, *, scale, initial_state, segment_ids, chunk_size=None
):
  """Runs `delta_product_step` over T; see `product_api.delta_product`."""
  del chunk_size  # Tokens are taken one by one.
  return _scan(
    delta_product_step,
    (q, k, v, beta, g),
    scale=scale,
    initial_state=initial_state,
    segment_ids=segment_ids,
  )
