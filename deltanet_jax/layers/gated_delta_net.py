"""Gated DeltaNet: Yang, Kautz and Hatamizadeh, arXiv 2412.06464.

Form as in https://github.com/fla-org/flash-linear-attention,
fla/layers/gated_deltanet.py at commit
0243cc45a8c86a20f5cea6a33ee6dd1b56f4ae24. The differences from it:

* projections start as N(0, 0.02^2), as everywhere in this package;
* value heads are as many as key heads.

The official 1.3B model has width 2048, num_heads 6, head_dim 256.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import gates
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import delta_rule
from pallas_kernels import delta_rule_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(options.RecurrenceConfig):
  """Options of the `gated_delta_net` mixer.

  Attributes:
    value_expansion: value width of a head, in multiples of head_dim.
    use_short_conv: causal depthwise convolution after the q, k, v projections.
    conv_width: taps of that convolution.
    use_output_gate: multiply the normalised output by SiLU of a projection.
    allow_negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  value_expansion: int = 2
  use_short_conv: bool = True
  conv_width: int = 4
  use_output_gate: bool = True
  allow_negative_eigenvalues: bool = False

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'conv_width', 'value_expansion')


class GatedDeltaNet(recurrence.Recurrent):
  """The delta rule with a decay per head.

  With x [B, T, D], H heads, keys of width K = head_dim and values of width
  V = value_expansion K,

      q = l2_normalize(SiLU(conv(x W_q)))     k likewise
      v = SiLU(conv(x W_v))                   beta = sigmoid(x W_beta)
      g = -exp(A_log) softplus(x W_a + dt_bias)
      S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
      y = (RMSNorm(S_t^T q_t / sqrt(K)) SiLU(x W_gate)) W_o

  State: H K V numbers.
  """

  config_class = GatedDeltaNetConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    self.value_dim = self.config.value_expansion * self.head_dim
    keys = self.num_heads * self.head_dim
    values = self.num_heads * self.value_dim
    self.q_proj = self._linear(keys, rngs)
    self.k_proj = self._linear(keys, rngs)
    self.v_proj = self._linear(values, rngs)
    self.beta_proj = self._linear(self.num_heads, rngs)
    self.a_proj = self._linear(self.num_heads, rngs)
    self.a_log = gates.initial_rates(rngs, (self.num_heads,), 0, 16)
    self.dt_bias = gates.initial_dt_bias(rngs, (self.num_heads,))
    if self.config.use_short_conv:
      self.q_conv = self._short_conv(keys, rngs)
      self.k_conv = self._short_conv(keys, rngs)
      self.v_conv = self._short_conv(values, rngs)
    if self.config.use_output_gate:
      self.gate_proj = self._linear(values, rngs)
    self.head_norm = norm.RMSNorm(self.value_dim, eps=self.norm_eps)
    self.o_proj = self._linear(self.model_width, rngs, values)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V]."""
    return self._zeros(batch, self.num_heads, self.head_dim, self.value_dim)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q = past.local('q_conv', self.q_proj(x))
    k = past.local('k_conv', self.k_proj(x))
    v = past.local('v_conv', self.v_proj(x))
    q, k, v = (self._split_heads(jax.nn.silu(y)) for y in (q, k, v))
    beta = jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))  # [B, T, H]
    if self.config.allow_negative_eigenvalues:
      beta = 2 * beta
    g = gates.log_decay(self.a_proj(x), self.a_log, self.dt_bias)
    o = past.recur(
      delta_rule,
      delta_rule_step,
      q,
      k,
      v,
      beta,
      g,
      scale=None,
      normalize_qk=True,
    )
    o = self.head_norm(o).reshape(*x.shape[:2], -1)  # [B, T, H V]
    if self.config.use_output_gate:
      o = o * jax.nn.silu(self.gate_proj(x))
    return self.o_proj(o)
