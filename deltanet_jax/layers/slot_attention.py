"""Attention over a bounded number of slots: what ABC and GSA share.

M slots of a head hold keys and values that are written to with weights phi_t in
R^M and decay with alpha_t in R^M,

    S^k_t[m] = alpha_t[m] S^k_{t-1}[m] + phi_t[m] k_t          in R^K
    S^v_t[m] = alpha_t[m] S^v_{t-1}[m] + phi_t[m] v_t          in R^V
    o_t = sum_m softmax_m(scale q_t . S^k_t[m]) S^v_t[m]

(table 4 of arXiv 2406.06484). Both recurrences are linear attention. The second
has phi as keys, and its decay per key channel. In the first the decay lies on
what is read out: there every slot is a value head of width 1 with the decay of
a head, and the M slots of a head share its queries and keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.layers import recurrence
from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_step


class SlotState(NamedTuple):
  """The slots of a layer, float32.

  Attributes:
    keys: [B, H M, K, 1].
    values: [B, H, M, V].
  """

  keys: jax.Array
  values: jax.Array


def empty_slots(
  batch: int, num_heads: int, num_slots: int, key_dim: int, value_dim: int
) -> SlotState:
  """Returns slots that hold nothing."""
  return SlotState(
    jnp.zeros((batch, num_heads * num_slots, key_dim, 1), jnp.float32),
    jnp.zeros((batch, num_heads, num_slots, value_dim), jnp.float32),
  )


def attend(
  past: recurrence.Past,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  write: jax.Array,
  g: jax.Array,
  *,
  scale: float | None,
) -> jax.Array:
  """Reads and writes slots; `past.state` is the `SlotState` before and after.

  Args:
    past: the call.
    q: queries [B, T, H, K].
    k: keys [B, T, H, K].
    v: values [B, T, H, V].
    write: phi [B, T, H, M].
    g: log alpha, float32 [B, T, H, M].
    scale: factor of the logits; None means K^-0.5.

  Returns:
    o [B, T, H, V].
  """
  rows = write.shape[:2]
  keys, values = past.state
  past.state = keys
  logits = past.recur(
    linear_attention,
    linear_attention_step,
    q,
    k,
    write.astype(k.dtype).reshape(*rows, -1, 1),
    g.reshape(*rows, -1),
    scale=scale,
  )
  keys, past.state = past.state, values
  logits = logits.astype(jnp.float32).reshape(write.shape)
  weights = jax.nn.softmax(logits, axis=-1)
  o = past.recur(
    linear_attention,
    linear_attention_step,
    weights.astype(v.dtype),
    write.astype(v.dtype),
    v,
    g,
    scale=1.0,
  )
  past.state = SlotState(keys, past.state)
  return o
