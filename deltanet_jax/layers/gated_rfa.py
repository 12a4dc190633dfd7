"""Random feature attention with a gate: Peng et al., arXiv 2103.02143.

Form as in the paper (the RFA-Gate variant of section 3.2, which the published
code leaves out); features as in https://github.com/Noahs-ARK/RFA,
random_feature_attention/utils.py at commit
d0f7146a0fd77eb37d7bbc513a46a40c33ddc683. The differences from it:

* the random directions are Gaussian, drawn once from a fixed seed and the same
  in all layers and at all steps (there: stored matrices, redrawn per step);
* features are divided by sqrt(M), so that products estimate the kernel, and the
  sum of weights is kept above 0.001 (there: times 0.1, above 1);
* projections have no bias and start as N(0, 0.02^2), as everywhere here.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import normalization

_LEAST_WEIGHT = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedRFAConfig(options.RecurrenceConfig):
  """Options of the `gated_rfa` mixer.

  Attributes:
    num_directions: random directions M; a key has 2 M features.
    feature_seed: seed of the directions.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  num_directions: int = 64
  feature_seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'num_directions')


class GatedRFA(recurrence.Recurrent):
  """Softmax attention estimated by random features, with a decay per head.

  With q, k, v the projections of x into H heads of width K = V, unit vectors q
  and k, random directions w_m in R^K and learned widths sigma in R^K,

      phi(x) = [sin(w_m . (sigma x)), cos(w_m . (sigma x))], m < M, / sqrt(M)
      g = sigmoid(x W_g + b)
      S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T
      z_t = g_t z_{t-1} + (1 - g_t) phi(k_t)
      o_t = S_t^T phi(q_t) / max(z_t^T phi(q_t), 0.001)

  then W_o. State: H 2 M (V + 1) numbers.
  """

  config_class = GatedRFAConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    width = self.num_heads * self.head_dim
    self.q_proj = self._linear(width, rngs)
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.g_proj = self._linear(self.num_heads, rngs, use_bias=True)
    self.o_proj = self._linear(self.model_width, rngs, width)
    self.sigma = nnx.Param(
      jnp.ones((self.num_heads, self.head_dim), jnp.float32)
    )

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, 2 M, V + 1]."""
    features = 2 * self.config.num_directions
    return self._zeros(batch, self.num_heads, features, self.head_dim + 1)

  def directions(self) -> jax.Array:
    """Returns the random directions [H, M, K], the same at every call."""
    shape = (self.num_heads, self.config.num_directions, self.head_dim)
    key = jax.random.key(self.config.feature_seed)
    return jax.random.normal(key, shape, jnp.float32)

  def _features(self, x: jax.Array) -> jax.Array:
    """Maps x [B, T, H, K] to [B, T, H, 2 M]."""
    y = (
      normalization.l2_normalize(x.astype(jnp.float32))
      * self.sigma[...][None, None]
    )
    y = jnp.einsum('bthk,hmk->bthm', y, self.directions())
    y = jnp.concatenate([jnp.sin(y), jnp.cos(y)], axis=-1)
    return (y * self.config.num_directions**-0.5).astype(x.dtype)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q, k, v = (
      self._split_heads(project(x))
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    raw = self.g_proj(x).astype(jnp.float32)  # [B, T, H]
    write = jax.nn.sigmoid(-raw)[..., None].astype(k.dtype)
    o, z = past.recur_with_normalizer(
      self._features(q),
      self._features(k) * write,
      v,
      jax.nn.log_sigmoid(raw),
      scale=1.0,
    )
    o = o / jnp.maximum(z, _LEAST_WEIGHT)[..., None]
    return self.o_proj(o.reshape(*x.shape[:2], -1))
