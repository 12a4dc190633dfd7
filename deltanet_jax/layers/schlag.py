"""The fast-weight delta rule of Schlag, Irie and Schmidhuber, arXiv 2102.11174.

Form as in https://github.com/ischlag/fast-weight-transformers and
https://github.com/IDSIA/recurrent-fwp, algorithmic/layers.py at commit
41e0c1b473f10a9546b5e3765fca5a025505eadf. The differences from them:

* the one projection is four, and these start as N(0, 0.02^2);
* sums of features have 1e-6 added before they divide;
* block, norms and channel mixer are the model's (there: post-norm, no RMSNorm).

This is the model that DeltaNet starts from: no convolutions, no SiLU, positive
features normalised by their sum, no norm of the output.
"""

import dataclasses
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import feature_maps
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import delta_rule
from pallas_kernels import delta_rule_step

PositiveMap = Literal['dpfp', 'elu_plus_one']


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchlagConfig(options.RecurrenceConfig):
  """Options of the `schlag` mixer.

  Attributes:
    feature_map: `dpfp`, deterministic parameter-free projection to 2 nu K
      features, or `elu_plus_one`.
    nu: how often `dpfp` widens the 2 K rectified features.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  feature_map: PositiveMap = 'dpfp'
  nu: int = 1

  def __post_init__(self):
    super().__post_init__()
    options.require_choice(self, 'feature_map', PositiveMap)
    options.require_at_least(self, 1, 'nu')


def dpfp(x: jax.Array, nu: int) -> jax.Array:
  """Returns [..., 2 nu K] products of rectified neighbours of x [..., K].

  With r = max([x, -x], 0) the j-th part is r times r rotated by j, j = 1 .. nu:
  only one of r_i and r_{i+K} is above 0, so few products are.
  """
  r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
  parts = [r * jnp.roll(r, j, axis=-1) for j in range(1, nu + 1)]
  return jnp.concatenate(parts, axis=-1)


class Schlag(recurrence.Recurrent):
  """The delta rule over positive features that sum to 1.

      q = phi(x W_q) / sum(phi(x W_q))    k likewise
      v = x W_v                           beta = sigmoid(x W_beta)
      S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
      y = S_t^T q_t W_o

  State: H 2 nu K V numbers with `dpfp`, H K V with `elu_plus_one`.
  """

  config_class = SchlagConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    width = self.num_heads * self.head_dim
    self.q_proj = self._linear(width, rngs)
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.beta_proj = self._linear(self.num_heads, rngs)
    self.o_proj = self._linear(self.model_width, rngs, width)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, features, V]."""
    is_dpfp = self.config.feature_map == 'dpfp'
    features = self.head_dim * (2 * self.config.nu if is_dpfp else 1)
    return self._zeros(batch, self.num_heads, features, self.head_dim)

  def _features(self, x: jax.Array) -> jax.Array:
    """Maps x [B, T, H, K] to features of sum 1."""
    if self.config.feature_map == 'dpfp':
      return norm.l1_normalize(dpfp(x, self.config.nu))
    return norm.l1_normalize(feature_maps.apply_feature_map('elu_plus_one', x))

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q, k, v = (
      self._split_heads(project(x))
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    beta = jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))  # [B, T, H]
    o = past.recur(
      delta_rule,
      delta_rule_step,
      self._features(q),
      self._features(k),
      v,
      beta,
      None,
      scale=1.0,
    )
    return self.o_proj(o.reshape(*x.shape[:2], -1))
