"""Linear attention: Katharopoulos et al., arXiv 2006.16236.

Form as in the paper; official code https://github.com/idiap/fast-transformers,
and https://github.com/fla-org/flash-linear-attention,
fla/layers/linear_attn.py at commit 038bdb3c65a221dba32c18449ee441477b225c0d.
The differences from them:

* projections have no bias and start as N(0, 0.02^2), as everywhere here;
* the feature maps are those of `delta_net`; learned ones are not offered.
"""

import dataclasses

from flax import nnx
import jax

from deltanet_jax.layers import feature_maps
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_step

_EPS = 1e-6
_POSITIVE = ('elu_plus_one', 'relu')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(options.RecurrenceConfig):
  """Options of the `linear_attention` mixer.

  The rows of the paper's table 4 are `identity` without normaliser (linear
  attention), another map without (+ kernel), and both (+ normalisation).

  Attributes:
    feature_map: map of queries and keys.
    use_normalizer: divide the output by the sum of its weights.
    use_output_norm: RMSNorm of the output of a head.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  feature_map: options.FeatureMap = 'elu_plus_one'
  use_normalizer: bool = True
  use_output_norm: bool = False

  def __post_init__(self):
    super().__post_init__()
    options.require_choice(self, 'feature_map', options.FeatureMap)
    if self.use_normalizer and self.feature_map not in _POSITIVE:
      raise ValueError(
        'use_normalizer needs a feature_map that is never negative, '
        f'{" or ".join(_POSITIVE)}, got {self.feature_map!r}'
      )


class LinearAttention(recurrence.Recurrent):
  """Attention whose weights are products of features.

  With q, k, v the projections of x into H heads of width K = V,

      S_t = S_{t-1} + phi(k_t) v_t^T        z_t = z_{t-1} + phi(k_t)
      o_t = S_t^T phi(q_t) / (z_t^T phi(q_t) + 1e-6)

  or, without the normaliser, S_t^T phi(q_t) / sqrt(K); then W_o. State: H K V
  numbers, and H K for z.
  """

  config_class = LinearAttentionConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    width = self.num_heads * self.head_dim
    self.q_proj = self._linear(width, rngs)
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.o_proj = self._linear(self.model_width, rngs, width)
    if self.config.use_output_norm:
      self.head_norm = norm.RMSNorm(self.head_dim, eps=self.norm_eps)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V (+ 1 for z)]."""
    columns = self.head_dim + self.config.use_normalizer
    return self._zeros(batch, self.num_heads, self.head_dim, columns)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q, k, v = (
      self._split_heads(project(x))
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    feature_map = self.config.feature_map
    q, k = (feature_maps.apply_feature_map(feature_map, y) for y in (q, k))
    if self.config.use_normalizer:
      o, z = past.recur_with_normalizer(q, k, v, None, scale=1.0)
      o = o / (z[..., None] + _EPS)
    else:
      o = past.recur(
        linear_attention, linear_attention_step, q, k, v, None, scale=None
      )
    if self.config.use_output_norm:
      o = self.head_norm(o)
    return self.o_proj(o.reshape(*x.shape[:2], -1))
