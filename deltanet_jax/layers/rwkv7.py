"""RWKV-7 "Goose": Peng et al., arXiv 2503.14456.

Form as in https://github.com/BlinkDL/RWKV-LM, folder RWKV-v7, and
https://github.com/fla-org/flash-linear-attention, fla/layers/rwkv7.py at commit
0315a70ea55304398ad372e56cdd211ce0119571. The differences from them:

* initial values that there depend on the layer's depth are those of the middle
  of the model, as a mixer does not know its depth;
* values are not mixed with those of the first layer (the v0, v1, v2 there),
  which a mixer does not see;
* projections start as N(0, 0.02^2) and the output projection too, instead of
  orthogonal matrices and zero;
* the block's channel mixer is the model's, not RWKV's own.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import low_rank
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from deltanet_jax.layers import token_shift
from pallas_kernels import diagonal_plus_low_rank
from pallas_kernels import diagonal_plus_low_rank_step
from pallas_kernels import normalization

_MAX_LOG_DECAY = -0.6065306597126334  # -exp(-1/2)
_SHIFTED = ('r', 'w', 'k', 'v', 'a', 'g')
_SHIFT_POWERS = {'r': 0.2, 'w': 0.9, 'k': 0.7, 'v': 0.7, 'a': 0.9, 'g': 0.2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV7Config(options.RecurrenceConfig):
  """Options of the `rwkv7` mixer.

  Attributes:
    decay_rank: rank of the decay's projection.
    rate_rank: rank of the in-context learning rate's projection.
    gate_rank: rank of the output gate's projection.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  decay_rank: int = 64
  rate_rank: int = 64
  gate_rank: int = 128

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'decay_rank', 'rate_rank', 'gate_rank')


def _zigzag(head_dim: int) -> jax.Array:
  """Returns z |z| for z from -1 to 1 over a head."""
  half = (head_dim - 1) / 2 or 1.0
  z = (jnp.arange(head_dim, dtype=jnp.float32) - half) / half
  return z * jnp.abs(z)


class RWKV7(recurrence.Recurrent):
  """A generalised delta rule: decays, removal and replacement keys apart.

  With x [B, T, D], H heads of width K = V and x_c = x_t + mu_c (x_{t-1} - x_t)
  for every use c of the input,

      r = x_r W_r    k' = x_k W_k    v = x_v W_v
      log w = -exp(-1/2) sigmoid(b_w + tanh(x_w A_w) B_w)      in (-0.61, 0)
      a = sigmoid(b_a + x_a A_a B_a)      gate = sigmoid(x_g A_g) B_g
      kappa = l2_normalize(k' k_k)        k = k' (1 + (a - 1) k_a)
      S_t = (Diag(w_t) - (a_t kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T
      o = GroupNorm(S_t^T r_t) + (r_t . (r_k k_t)) v_t
      y = (o gate) W_o

  State: H K V numbers.
  """

  config_class = RWKV7Config

  def _build(self, rngs: nnx.Rngs) -> None:
    config, width = self.config, self.num_heads * self.head_dim
    self.shift = token_shift.TokenShift(self.model_width, dtype=self.dtype)
    channel = jnp.linspace(0, 1, self.model_width, endpoint=False)
    self.mu = nnx.Param(
      jnp.stack([1 - channel ** (_SHIFT_POWERS[c] / 2) for c in _SHIFTED])
    )  # [6, D]
    self.r_proj = self._linear(width, rngs)
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.o_proj = self._linear(self.model_width, rngs, width)

    def project(rank, activation, use_bias=True):
      return low_rank.LowRank(
        self.model_width,
        rank,
        width,
        activation=activation,
        use_bias=use_bias,
        dtype=self.dtype,
        rngs=rngs,
      )

    self.w_proj = project(config.decay_rank, jnp.tanh)
    self.a_proj = project(config.rate_rank, None)
    self.gate_proj = project(config.gate_rank, jax.nn.sigmoid, use_bias=False)
    slope = jnp.linspace(0, 1, width)
    zigzag = jnp.tile(_zigzag(self.head_dim), self.num_heads)
    exponent = 1 + 0.5**0.3
    self.w_proj.up.bias.set_value(6 * slope**exponent - 5.5 + 2.5 * zigzag)
    self.a_proj.up.bias.set_value(-0.19 + 0.3 * zigzag + 0.4 * (slope - 0.5))
    heads = (self.num_heads, self.head_dim)
    self.k_k = nnx.Param((0.71 - 0.1 * (slope - 0.5)).reshape(heads))
    self.k_a = nnx.Param(jnp.full(heads, 1.02, jnp.float32))
    self.r_k = nnx.Param(jnp.full(heads, -0.04, jnp.float32))
    self.head_norm = norm.HeadNorm(
      self.num_heads, self.head_dim, eps=1e-5 * self.head_dim
    )

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V]."""
    return self._zeros(batch, self.num_heads, self.head_dim, self.head_dim)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    difference = past.local('shift', x) - x
    mu = self.mu[...].astype(x.dtype)[:, None, None]
    mixed = dict(zip(_SHIFTED, x[None] + difference[None] * mu, strict=True))
    r = self._split_heads(self.r_proj(mixed['r']))
    k = self._split_heads(self.k_proj(mixed['k'])).astype(jnp.float32)
    v = self._split_heads(self.v_proj(mixed['v']))
    w = self._split_heads(self.w_proj(mixed['w'])).astype(jnp.float32)
    log_w = _MAX_LOG_DECAY * jax.nn.sigmoid(w)
    a = self._split_heads(self.a_proj(mixed['a'])).astype(jnp.float32)
    a = jax.nn.sigmoid(a)  # [B, T, H, K]
    k_k, k_a, r_k = (p[...][None, None] for p in (self.k_k, self.k_a, self.r_k))
    kappa = normalization.l2_normalize(k * k_k)
    k = k * (1 + (a - 1) * k_a)
    write, read = (-a * kappa).astype(r.dtype), kappa.astype(r.dtype)
    o = past.recur(
      diagonal_plus_low_rank,
      diagonal_plus_low_rank_step,
      r,
      k.astype(r.dtype),
      v,
      write,
      read,
      log_w,
      scale=1.0,
    )
    bonus = jnp.sum(r.astype(jnp.float32) * k * r_k, axis=-1, keepdims=True)
    o = self.head_norm(o) + bonus.astype(v.dtype) * v
    return self.o_proj(o.reshape(*x.shape[:2], -1) * self.gate_proj(mixed['g']))
