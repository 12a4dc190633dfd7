"""The DeltaNet token mixer."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import feature_maps
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import delta_rule
from pallas_kernels import delta_rule_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(options.RecurrenceConfig):
  """Options of the `delta_net` mixer; the defaults are the paper's.

  Attributes:
    use_short_conv: causal depthwise convolution after the q, k, v projections.
    conv_width: taps of that convolution.
    feature_map: map of q and k before their normalisation.
    qk_norm: `l2`, or `l1` (division by the sum of the absolute values).
    allow_negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    use_output_gate: multiply the normalised output by SiLU of a projection.
    chunk_size: chunk of the chunkwise form; 0: the implementation's choice.
    implementation: see `pallas_kernels.delta_rule`; empty: automatic.
  """

  use_short_conv: bool = True
  conv_width: int = 4
  feature_map: options.FeatureMap = 'silu'
  qk_norm: options.QKNorm = 'l2'
  allow_negative_eigenvalues: bool = False
  use_output_gate: bool = False

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'conv_width')
    options.require_choice(self, 'feature_map', options.FeatureMap)
    options.require_choice(self, 'qk_norm', options.QKNorm)


class DeltaNet(recurrence.Recurrent):
  """The delta-rule layer of Yang et al., arXiv 2406.06484, section 3.4.

  With x [B, T, D], H heads of width K = V = head_dim, phi the feature map,

      q = normalize(phi(conv(x W_q)))      k likewise
      v = SiLU(conv(x W_v))
      beta = sigmoid(x W_beta)             twice that with negative eigenvalues
      y = RMSNorm(delta_rule(q, k, v, beta)) W_o

  where q, k, v are cut into heads before their normalisation, the scale of the
  delta rule is 1, and the RMSNorm acts on a head, its scale [V] shared by the
  heads. An output gate multiplies what enters W_o by SiLU(x W_gate).

  The layer needs no positions, and documents packed into a row do not see each
  other when `segment_ids` tells them apart. State: H K V numbers.
  """

  config_class = DeltaNetConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    width = self.num_heads * self.head_dim
    self.q_proj = self._linear(width, rngs)
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.beta_proj = self._linear(self._num_betas, rngs)
    self.o_proj = self._linear(self.model_width, rngs, width)
    if self.config.use_short_conv:
      self.q_conv = self._short_conv(width, rngs)
      self.k_conv = self._short_conv(width, rngs)
      self.v_conv = self._short_conv(width, rngs)
    if self.config.use_output_gate:
      self.gate_proj = self._linear(width, rngs)
    self.head_norm = norm.RMSNorm(self.head_dim, eps=self.norm_eps)

  @property
  def _num_betas(self) -> int:
    return self.num_heads

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V]."""
    return self._zeros(batch, self.num_heads, self.head_dim, self.head_dim)

  def _delta_rule(self, q, k, v, beta, past: recurrence.Past) -> jax.Array:
    """Returns o [B, T, H, V] of features q, k that are not normalised."""
    is_l2 = self.config.qk_norm == 'l2'
    if not is_l2:
      q, k = norm.l1_normalize(q), norm.l1_normalize(k)
    return past.recur(
      delta_rule,
      delta_rule_step,
      q,
      k,
      v,
      beta,
      None,
      scale=1.0,
      normalize_qk=is_l2,
    )

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q, k, v = (
      self._split_heads(past.local(f'{name}_conv', project(x)))
      for name, project in (
        ('q', self.q_proj),
        ('k', self.k_proj),
        ('v', self.v_proj),
      )
    )  # [B, T, H, K]
    feature_map = self.config.feature_map
    q, k = (feature_maps.apply_feature_map(feature_map, y) for y in (q, k))
    beta = jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))  # [B, T, H]
    if self.config.allow_negative_eigenvalues:
      beta = 2 * beta
    o = self._delta_rule(q, k, jax.nn.silu(v), beta, past)
    o = self.head_norm(o).reshape(*x.shape[:2], -1)  # [B, T, H V]
    if self.config.use_output_gate:
      o = o * jax.nn.silu(self.gate_proj(x))
    return self.o_proj(o)
