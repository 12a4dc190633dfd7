"""Gated linear attention: Yang et al., arXiv 2312.06635.

Form as in https://github.com/fla-org/flash-linear-attention, fla/layers/gla.py
at commit 0c4ada1ffe02c3b6c677cbb236764320a61e52c1. The difference from it:
projections start as N(0, 0.02^2), as everywhere in this package.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import low_rank
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAConfig(options.RecurrenceConfig):
  """Options of the `gla` mixer.

  Attributes:
    key_expansion: key width of a head, in multiples of head_dim.
    gate_rank: rank of the decay's projection.
    gate_temperature: what log sigmoid is divided by to give the log-decay.
    use_short_conv: causal depthwise convolution and SiLU after the q, k, v
      projections.
    conv_width: taps of that convolution.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  key_expansion: float = 0.5
  gate_rank: int = 16
  gate_temperature: float = 16.0
  use_short_conv: bool = False
  conv_width: int = 4

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'gate_rank', 'conv_width')
    options.require_above(self, 0, 'key_expansion', 'gate_temperature')


class GLA(recurrence.Recurrent):
  """Linear attention with a decay per key channel.

  With q, k, v the projections of x into H heads, values of width V = head_dim,
  keys of width K = key_expansion V,

      g = log sigmoid(x W_g W_g' + b) / 16                    [B, T, H, K]
      S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T
      y = (RMSNorm(S_t^T q_t / sqrt(K)) SiLU(x W_gate)) W_o

  State: H K V numbers.
  """

  config_class = GLAConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    factor = self.config.key_expansion
    self.key_dim = options.expand(self.head_dim, factor, 'key_expansion')
    keys = self.num_heads * self.key_dim
    values = self.num_heads * self.head_dim
    self.q_proj = self._linear(keys, rngs)
    self.k_proj = self._linear(keys, rngs)
    self.v_proj = self._linear(values, rngs)
    self.gate_proj = self._linear(values, rngs)
    self.o_proj = self._linear(self.model_width, rngs, values)
    self.decay_proj = low_rank.LowRank(
      self.model_width,
      self.config.gate_rank,
      keys,
      use_bias=True,
      dtype=self.dtype,
      rngs=rngs,
    )
    if self.config.use_short_conv:
      self.q_conv = self._short_conv(keys, rngs)
      self.k_conv = self._short_conv(keys, rngs)
      self.v_conv = self._short_conv(values, rngs)
    self.head_norm = norm.RMSNorm(self.head_dim, eps=self.norm_eps)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V]."""
    return self._zeros(batch, self.num_heads, self.key_dim, self.head_dim)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q = past.local('q_conv', self.q_proj(x))
    k = past.local('k_conv', self.k_proj(x))
    v = past.local('v_conv', self.v_proj(x))
    if self.config.use_short_conv:
      q, k, v = (jax.nn.silu(y) for y in (q, k, v))
    q, k, v = (self._split_heads(y) for y in (q, k, v))
    g = self._split_heads(self.decay_proj(x).astype(jnp.float32))
    g = jax.nn.log_sigmoid(g) / self.config.gate_temperature
    o = past.recur(
      linear_attention, linear_attention_step, q, k, v, g, scale=None
    )
    o = self.head_norm(o).reshape(*x.shape[:2], -1)  # [B, T, H V]
    return self.o_proj(o * jax.nn.silu(self.gate_proj(x)))
