"""DeltaProduct: Siems et al., arXiv 2502.10297.

Form as in https://github.com/fla-org/flash-linear-attention,
fla/layers/gated_deltaproduct.py at commit
0315a70ea55304398ad372e56cdd211ce0119571 (the authors' own repository is
https://github.com/automl/DeltaProduct, 38cd4e4b). The differences from it:

* projections start as N(0, 0.02^2), as everywhere in this package;
* value heads are as many as key heads, and values as wide as keys unless
  `value_expansion` says otherwise (there: twice);
* keys, values and betas of a head lie side by side (there: of a delta rule), so
  that devices can share the heads;
* the forget gate is off unless `use_forget_gate` is set (there: on).
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import gates
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import delta_product
from pallas_kernels import delta_product_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaProductConfig(options.RecurrenceConfig):
  """Options of the `delta_product` mixer.

  Attributes:
    num_householder: delta rules per token.
    use_forget_gate: Gated DeltaProduct: a decay per head before a token's
      first delta rule.
    value_expansion: value width of a head, in multiples of head_dim.
    use_short_conv: causal depthwise convolution after the q, k, v projections.
    conv_width: taps of that convolution.
    use_output_gate: multiply the normalised output by SiLU of a projection.
    allow_negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  num_householder: int = 2
  use_forget_gate: bool = False
  value_expansion: int = 1
  use_short_conv: bool = True
  conv_width: int = 4
  use_output_gate: bool = True
  allow_negative_eigenvalues: bool = True

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(
      self, 1, 'num_householder', 'conv_width', 'value_expansion'
    )


class DeltaProduct(recurrence.Recurrent):
  """Several delta rules per token, read out after the last.

  With x [B, T, D], H heads of width K, values of width V and j = 1 .. n,

      q = l2_normalize(SiLU(conv(x W_q)))
      k_j = l2_normalize(SiLU(conv(x W_k,j)))     v_j = SiLU(conv(x W_v,j))
      beta_j = 2 sigmoid(x W_beta,j)
      S_{t,0} = exp(g_t) S_{t-1}, g as in `gated_delta_net`; or S_{t-1}
      S_{t,j} = (I - beta_{t,j} k_{t,j} k_{t,j}^T) S_{t,j-1}
                + beta_{t,j} k_{t,j} v_{t,j}^T
      y = (RMSNorm(S_{t,n}^T q_t / sqrt(K)) SiLU(x W_gate)) W_o

  State: H K V numbers, whatever n.
  """

  config_class = DeltaProductConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    self.value_dim = self.config.value_expansion * self.head_dim
    num, heads = self.config.num_householder, self.num_heads
    keys, values = heads * self.head_dim, heads * self.value_dim
    self.q_proj = self._linear(keys, rngs)
    self.k_proj = self._linear(num * keys, rngs)
    self.v_proj = self._linear(num * values, rngs)
    self.beta_proj = self._linear(num * heads, rngs)
    if self.config.use_forget_gate:
      self.a_proj = self._linear(heads, rngs)
      self.a_log = gates.initial_rates(rngs, (heads,), 0, 16)
      self.dt_bias = gates.initial_dt_bias(rngs, (heads,))
    if self.config.use_short_conv:
      self.q_conv = self._short_conv(keys, rngs)
      self.k_conv = self._short_conv(num * keys, rngs)
      self.v_conv = self._short_conv(num * values, rngs)
    if self.config.use_output_gate:
      self.gate_proj = self._linear(values, rngs)
    self.head_norm = norm.RMSNorm(self.value_dim, eps=self.norm_eps)
    self.o_proj = self._linear(self.model_width, rngs, values)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V]."""
    return self._zeros(batch, self.num_heads, self.head_dim, self.value_dim)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q = self._split_heads(jax.nn.silu(past.local('q_conv', self.q_proj(x))))
    k = jax.nn.silu(past.local('k_conv', self.k_proj(x)))
    v = jax.nn.silu(past.local('v_conv', self.v_proj(x)))
    beta = jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))
    if self.config.allow_negative_eigenvalues:
      beta = 2 * beta
    steps = (*x.shape[:2], self.num_heads, self.config.num_householder)
    k, v, beta = (
      y.reshape(*steps, -1).swapaxes(2, 3) for y in (k, v, beta)
    )  # [B, T, N, H, K]
    g = None
    if self.config.use_forget_gate:
      g = gates.log_decay(self.a_proj(x), self.a_log, self.dt_bias)
    o = past.recur(
      delta_product,
      delta_product_step,
      q,
      k,
      v,
      beta[..., 0],
      g,
      scale=None,
      normalize_qk=True,
    )
    o = self.head_norm(o).reshape(*x.shape[:2], -1)  # [B, T, H V]
    if self.config.use_output_gate:
      o = o * jax.nn.silu(self.gate_proj(x))
    return self.o_proj(o)
