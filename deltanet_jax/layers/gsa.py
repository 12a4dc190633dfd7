"""Gated slot attention: Zhang et al., arXiv 2409.07146.

Form as in https://github.com/fla-org/flash-linear-attention, fla/layers/gsa.py
at commit 0315a70ea55304398ad372e56cdd211ce0119571. The difference from it:
projections start as N(0, 0.02^2), as everywhere in this package.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from deltanet_jax.layers import slot_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSAConfig(options.RecurrenceConfig):
  """Options of the `gsa` mixer.

  Attributes:
    num_slots: slots M of a head.
    gate_temperature: what log sigmoid is divided by to give the log-decay.
    use_short_conv: causal depthwise convolution and SiLU after the q, k, v
      projections.
    conv_width: taps of that convolution.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  num_slots: int = 64
  gate_temperature: float = 8.0
  use_short_conv: bool = False
  conv_width: int = 4

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'num_slots', 'conv_width')
    options.require_above(self, 0, 'gate_temperature')


class GSA(recurrence.Recurrent):
  """Slots with a decay of their own that leaves room for what is written.

  With q, k, v = SiLU of the projections of x into H heads of width K = V,

      alpha = sigmoid(x W_f)^(1/8)        phi = 1 - alpha      [B, T, H, M]
      o = the slot attention of q, k, v, phi, alpha, with scale 1
      y = RMSNorm(SiLU(o)) W_o

  with the norm over all heads; see `slot_attention`. State: H M (K + V)
  numbers.
  """

  config_class = GSAConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    width = self.num_heads * self.head_dim
    self.q_proj = self._linear(width, rngs)
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.f_proj = self._linear(self.num_heads * self.config.num_slots, rngs)
    self.o_proj = self._linear(self.model_width, rngs, width)
    if self.config.use_short_conv:
      self.q_conv = self._short_conv(width, rngs)
      self.k_conv = self._short_conv(width, rngs)
      self.v_conv = self._short_conv(width, rngs)
    self.norm = norm.RMSNorm(width, eps=self.norm_eps)

  def empty_state(self, batch: int) -> slot_attention.SlotState:
    """Returns empty slots."""
    return slot_attention.empty_slots(
      batch,
      self.num_heads,
      self.config.num_slots,
      self.head_dim,
      self.head_dim,
    )

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q = past.local('q_conv', self.q_proj(x))
    k = past.local('k_conv', self.k_proj(x))
    v = past.local('v_conv', self.v_proj(x))
    if self.config.use_short_conv:
      q, k, v = (jax.nn.silu(y) for y in (q, k, v))
    q, k, v = (self._split_heads(jax.nn.silu(y)) for y in (q, k, v))
    f = self._split_heads(self.f_proj(x).astype(jnp.float32))
    g = jax.nn.log_sigmoid(f) / self.config.gate_temperature
    o = slot_attention.attend(past, q, k, v, -jnp.expm1(g), g, scale=1.0)
    o = jax.nn.silu(o).reshape(*x.shape[:2], -1)
    return self.o_proj(self.norm(o))
