"""RWKV-4: Peng et al., arXiv 2305.13048.

Form as in https://github.com/BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py at commit
038f06b99627049729e332bc66159e0a0092cdaa. The differences from it:

* initial values that there depend on the layer's depth are those of the middle
  of the model, as a mixer does not know its depth;
* projections start as N(0, 0.02^2), as everywhere in this package;
* the block's channel mixer is the model's, not RWKV's own.
"""

import dataclasses
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import recurrence
from deltanet_jax.layers import token_shift

_NOTHING = -1e30  # Logarithm of no weight; finite, so that no NaN arises.
_MIDDLE = 0.5  # Where in the depth the initial values are taken, 0 to 1.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV4Config:
  """Options of the `rwkv4` mixer: there are none."""


class _Sums(NamedTuple):
  """Weighted sums over a stretch of tokens, float32 [B, T, D] each.

  Attributes:
    log_decay: what the stretch multiplies earlier sums by, as a logarithm.
    maximum: m, the scale of the sums; no gradient flows through it.
    values: sum of weight times v, times exp(-m).
    weights: sum of the weights, times exp(-m).
  """

  log_decay: jax.Array
  maximum: jax.Array
  values: jax.Array
  weights: jax.Array


def _then(left: _Sums, right: _Sums) -> _Sums:
  """Composes two stretches, in the scale of the greater."""
  earlier = right.log_decay + left.maximum
  maximum = jax.lax.stop_gradient(jnp.maximum(earlier, right.maximum))
  a, b = jnp.exp(earlier - maximum), jnp.exp(right.maximum - maximum)
  return _Sums(
    left.log_decay + right.log_decay,
    maximum,
    a * left.values + b * right.values,
    a * left.weights + b * right.weights,
  )


class RWKV4(recurrence.Recurrent):
  """An average per channel, weighted by exp(k) and decaying; no heads.

  With x_c = mu_c x_t + (1 - mu_c) x_{t-1} for c = k, v, r, decays
  w = exp(time_decay) and bonus u per channel,

      k = x_k W_k    v = x_v W_v    r = sigmoid(x_r W_r)
      S_t = exp(-w) S_{t-1} + exp(k_t) v_t
      z_t = exp(-w) z_{t-1} + exp(k_t)
      o_t = (S_{t-1} + exp(u + k_t) v_t) / (z_{t-1} + exp(u + k_t))
      y = (r o) W_o

  computed in the scale of the running maximum of the exponents, which is part
  of the state. State: 3 D numbers.
  """

  config_class = RWKV4Config

  def _build(self, rngs: nnx.Rngs) -> None:
    width = self.model_width
    self.shift = token_shift.TokenShift(width, dtype=self.dtype)
    channel = jnp.linspace(0, 1, width, endpoint=False)
    plain = channel ** (1 - _MIDDLE)
    self.mu = nnx.Param(
      jnp.stack([plain, plain + 0.3 * _MIDDLE, channel ** ((1 - _MIDDLE) / 2)])
    )  # [3, D] for k, v, r
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.r_proj = self._linear(width, rngs)
    self.o_proj = self._linear(width, rngs)
    slope = jnp.linspace(0, 1, width)
    self.time_decay = nnx.Param(-5 + 8 * slope ** (0.7 + 1.3 * _MIDDLE))
    zigzag = ((jnp.arange(width) + 1) % 3 - 1).astype(jnp.float32)
    self.bonus = nnx.Param(jnp.log(0.3) + 0.5 * zigzag)

  def empty_state(self, batch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the maximum of no exponent, and S and z of zeros, [B, D]."""
    zeros = self._zeros(batch, self.model_width)
    return zeros + _NOTHING, zeros, zeros

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    before = past.local('shift', x)
    mu = self.mu[...].astype(x.dtype)[:, None, None]
    x_k, x_v, x_r = x[None] * mu + before[None] * (1 - mu)
    k = self.k_proj(x_k).astype(jnp.float32)
    v = self.v_proj(x_v).astype(jnp.float32)
    r = jax.nn.sigmoid(self.r_proj(x_r))
    o = self._weighted_average(k, v, past)
    return self.o_proj(r * o.astype(r.dtype))

  def _weighted_average(self, k, v, past: recurrence.Past) -> jax.Array:
    """Returns o [B, T, D] of float32 k and v; advances the state."""
    before = _Sums(jnp.zeros_like(past.state[0]), *past.state)
    sums = jax.tree.map(
      lambda first, x: jnp.concatenate([first[:, None], x], axis=1),
      before,
      self._token_sums(k, v, past),
    )
    sums = jax.lax.associative_scan(_then, sums, axis=1)
    past.state = tuple(x[:, -1] for x in sums[1:])
    _, maximum, values, weights = (x[:, :-1] for x in sums)
    if past.resets is not None:
      maximum = jnp.where(past.resets[..., None], _NOTHING, maximum)
    own = self.bonus[...][None, None] + k
    scale = jax.lax.stop_gradient(jnp.maximum(maximum, own))
    a, b = jnp.exp(maximum - scale), jnp.exp(own - scale)
    return (a * values + b * v) / (a * weights + b)

  def _token_sums(self, k, v, past: recurrence.Past) -> _Sums:
    """Returns what every token adds: exp(k) v and exp(k)."""
    decay = -jnp.exp(self.time_decay[...])[None, None]
    decay = jnp.broadcast_to(decay, k.shape)
    maximum = jax.lax.stop_gradient(k)
    weights = jnp.exp(k - maximum)  # 1; it carries the gradient of k.
    if past.resets is not None:
      decay = jnp.where(past.resets[..., None], _NOTHING, decay)
    if past.tokens is not None:
      is_token = past.tokens[..., None]
      decay = jnp.where(is_token, decay, 0)
      maximum = jnp.where(is_token, maximum, _NOTHING)
      weights = jnp.where(is_token, weights, 0)
    return _Sums(decay, maximum, weights * v, weights)
