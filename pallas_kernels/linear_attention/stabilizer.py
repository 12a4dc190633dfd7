"""Gates without bounds: the max-stabilizer of the mLSTM.

With log forget gates f and log input gates i the mLSTM is

    S_t = exp(f_t) S_{t-1} + exp(i_t) k_t v_t^T,

whose state overflows where i is large and vanishes where it is very negative.
It is computed as exp(-m_t) S_t with the running maximum (Beck et al., "xLSTM:
Extended Long Short-Term Memory", 2024, equation 15)

    m_t = max(f_t + m_{t-1}, i_t),

which is a decay g_t and a factor of the key, both at most 1:

    g_t = f_t + m_{t-1} - m_t        write_t = exp(i_t - m_t).

Maximum and sum are a semiring, so m is an associative scan over the pairs (sum
of f, m): (a, b) then (a', b') is (a + a', max(a' + b, b')). The decay is taken
as f_t - (m_t - m_{t-1}): that difference is exact where it matters, so rounding
in m changes the scale of a state, never its value (and g may exceed 0 by one
rounding of m).

No gradient flows through m. Whatever numbers stand for m, exp(m_t) times the
scaled state is the same S_t, and so is what is read of it in proportion to
exp(m_t): the derivative by m_t is zero, for t >= 1, and leaving it out is exact
rather than an approximation. m_0 is part of the state given, exp(m_0) S; its
gradient is kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import argument_checks
from pallas_kernels import decay


class StabilizedGates(NamedTuple):
  """What `stabilized_gates` returns, float32."""

  g: jax.Array  # [B, T, H]
  write: jax.Array  # [B, T, H]
  floor: jax.Array  # [B, T, H]
  m: jax.Array  # [B, H]


def _running_maximum(f, i, reset, initial_m):
  """Returns m; what lies before a reset, or before a first token, is -inf."""

  def then(left, right):
    return left[0] + right[0], jnp.maximum(right[0] + left[1], right[1])

  f = jnp.where(reset, -jnp.inf, f)
  passed, m = jax.lax.associative_scan(then, (f, i), axis=1)
  return jnp.maximum(passed + initial_m, m)


def stabilized_gates(
  log_forget: jax.Array,
  log_input: jax.Array,
  *,
  initial_m: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> StabilizedGates:
  """Scales the gates of an mLSTM by their running maximum; see the module.

  With k the keys and `gates` the result, the mLSTM is

      k = k * gates.write[..., None]
      o, z, (state, normalizer) = linear_attention_with_normalizer(
        q, k, v, gates.g, initial_state=..., segment_ids=...)
      h = o / max(|z|, gates.floor)[..., None],

  equations 19 to 27 of the paper. The state to go on from is (state,
  normalizer) with gates.m as `initial_m`.

  Args:
    log_forget: f [B, T, H], at most 0, finite.
    log_input: i [B, T, H], finite.
    initial_m: [B, H], the m of the tokens before; -inf where there were none
      (the state is zero then). None means -inf.
    segment_ids: int32 [B, T], as in `linear_attention`.

  Returns:
    g: log-decays; 0 where the token starts afresh, and at padding.
    write: factors of the keys, in [0, 1]; 0 at padding.
    floor: exp(-m_t), the 1 of the read-out max(|z|, 1) in the state's scale,
      within the normal numbers of the dtype so that no quotient is 0 / 0; 1 at
      padding.
    m: the maximum after the last token; -inf where there was none.
  """
  dtype = argument_checks.state_dtype(log_forget)
  f, i = log_forget.astype(dtype), log_input.astype(dtype)
  if segment_ids is None:
    segment_ids = jnp.ones(f.shape[:2], jnp.int32)
  if initial_m is None:
    initial_m = jnp.full(f[:, 0].shape, -jnp.inf, dtype)
  resets, valid = (x[..., None] for x in decay.count_resets(segment_ids))
  reset = jnp.diff(resets, axis=1, prepend=0) > 0
  f, i = jnp.where(valid, f, 0), jnp.where(valid, i, -jnp.inf)
  first = initial_m.astype(dtype)[:, None]  # [B, 1, H]
  m = jax.lax.stop_gradient(_running_maximum(f, i, reset, first))
  # Up to the first token the m given goes on, with its gradient.
  m = jnp.where(jnp.cumsum(valid, axis=1) > 0, m, first)
  before = jnp.concatenate([first, m[:, :-1]], axis=1)
  fresh = ~valid | reset | jnp.isneginf(before)
  g = jnp.where(fresh, 0, f - (m - jnp.where(fresh, 0, before)))
  write = jnp.exp(jnp.where(valid, i - m, -jnp.inf))
  info = jnp.finfo(dtype)
  floor = jnp.clip(jnp.exp(jnp.where(valid, -m, 0)), info.tiny, info.max)
  return StabilizedGates(g, write, floor, m[:, -1])
