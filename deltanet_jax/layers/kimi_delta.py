"""Kimi Delta Attention: Kimi Team, arXiv 2510.26692.

Form as in https://github.com/fla-org/flash-linear-attention,
fla/layers/kda.py at commit 0812a88c5e0eb95299f1370cd2cc6256f732dbc8. The
differences from it:

* projections start as N(0, 0.02^2), as everywhere in this package;
* value heads are as many as key heads, and values as wide as keys.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import gates
from deltanet_jax.layers import low_rank
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import delta_rule
from pallas_kernels import delta_rule_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class KimiDeltaConfig(options.RecurrenceConfig):
  """Options of the `kimi_delta` mixer.

  Attributes:
    use_short_conv: causal depthwise convolution after the q, k, v projections.
    conv_width: taps of that convolution.
    allow_negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  use_short_conv: bool = True
  conv_width: int = 4
  allow_negative_eigenvalues: bool = False

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'conv_width')


class KimiDelta(recurrence.Recurrent):
  """The delta rule with a decay per key channel.

  With x [B, T, D], H heads of width K = V = head_dim,

      q = l2_normalize(SiLU(conv(x W_q)))     k likewise
      v = SiLU(conv(x W_v))                   beta = sigmoid(x W_beta)
      g = -exp(A_log) softplus(x W_f W_f' + dt_bias)          [B, T, H, K]
      S_t = (I - beta_t k_t k_t^T) Diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T
      y = (RMSNorm(S_t^T q_t / sqrt(K)) sigmoid(x W_g W_g' + b)) W_o

  with W_f, W_g of rank K. State: H K V numbers.
  """

  config_class = KimiDeltaConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    width = self.num_heads * self.head_dim

    def through_a_head(use_bias):
      return low_rank.LowRank(
        self.model_width,
        self.head_dim,
        width,
        use_bias=use_bias,
        dtype=self.dtype,
        rngs=rngs,
      )

    self.q_proj = self._linear(width, rngs)
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.beta_proj = self._linear(self.num_heads, rngs)
    self.f_proj = through_a_head(use_bias=False)
    self.gate_proj = through_a_head(use_bias=True)
    self.a_log = gates.initial_rates(rngs, (self.num_heads,), 1, 16)
    self.dt_bias = nnx.Param(jnp.zeros((self.num_heads, self.head_dim)))
    if self.config.use_short_conv:
      self.q_conv = self._short_conv(width, rngs)
      self.k_conv = self._short_conv(width, rngs)
      self.v_conv = self._short_conv(width, rngs)
    self.head_norm = norm.RMSNorm(self.head_dim, eps=self.norm_eps)
    self.o_proj = self._linear(self.model_width, rngs, width)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V]."""
    return self._zeros(batch, self.num_heads, self.head_dim, self.head_dim)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q = past.local('q_conv', self.q_proj(x))
    k = past.local('k_conv', self.k_proj(x))
    v = past.local('v_conv', self.v_proj(x))
    q, k, v = (self._split_heads(jax.nn.silu(y)) for y in (q, k, v))
    beta = jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))  # [B, T, H]
    if self.config.allow_negative_eigenvalues:
      beta = 2 * beta
    f = self._split_heads(self.f_proj(x))
    g = gates.log_decay(f, self.a_log, self.dt_bias)  # [B, T, H, K]
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
    gate = jax.nn.sigmoid(self.gate_proj(x).astype(jnp.float32))
    return self.o_proj(o * gate.astype(o.dtype))
