"""RWKV-6 "Finch": Peng et al., arXiv 2404.05892.

Form as in https://github.com/BlinkDL/RWKV-LM, folder RWKV-v5 (time mixing
x060), and https://github.com/fla-org/flash-linear-attention,
fla/layers/rwkv6.py at commit 00937f204bb709bd93e469a1983104db0a06a5df. The
differences from them:

* initial values that there depend on the layer's depth are those of the middle
  of the model, as a mixer does not know its depth;
* projections start as N(0, 0.02^2), as everywhere in this package;
* the block's channel mixer is the model's, not RWKV's own.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import low_rank
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from deltanet_jax.layers import token_shift
from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_step

_SHIFTED = ('w', 'k', 'v', 'r', 'g')
_MIDDLE = 0.5  # Where in the depth the initial values are taken, 0 to 1.
_NORM_EPS = 64e-5
_UP_BOUND = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV6Config(options.RecurrenceConfig):
  """Options of the `rwkv6` mixer.

  Attributes:
    shift_rank: rank of the projection that says how much of the token before
      enters, per use of the input.
    decay_rank: rank of the decay's projection.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  shift_rank: int = 32
  decay_rank: int = 64

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'shift_rank', 'decay_rank')


def _initial_shift(model_width: int) -> jax.Array:
  """Returns the initial shares of the token before, [1 + 5, D]."""
  channel = jnp.linspace(0, 1, model_width, endpoint=False)
  plain, slow = channel ** (1 - _MIDDLE), channel ** ((1 - _MIDDLE) / 2)
  more = plain + 0.3 * _MIDDLE
  return 1 - jnp.stack([plain, plain, plain, more, slow, slow])


class RWKV6(recurrence.Recurrent):
  """Linear attention with data-dependent decays, shifts and a bonus.

  With x [B, T, D], H heads of width K = V, d_t = x_{t-1} - x_t and, for each
  use c of the input, the data-dependent mixture

      m = x + d mu_x
      x_c = x + d (mu_c + tanh(m A_c) B_c)          c = w, k, v, r, g
      r = x_r W_r    k = x_k W_k    v = x_v W_v    gate = SiLU(x_g W_g)
      log w = -exp(b_w + tanh(x_w A_w) B_w)          [B, T, H, K]
      S_t = Diag(w_t) S_{t-1} + k_t v_t^T
      o_t = (S_{t-1} + Diag(u) k_t v_t^T)^T r_t
      y = (GroupNorm(o) gate) W_o

  State: H K V numbers.
  """

  config_class = RWKV6Config

  def _build(self, rngs: nnx.Rngs) -> None:
    config, width = self.config, self.num_heads * self.head_dim
    self.shift = token_shift.TokenShift(self.model_width, dtype=self.dtype)
    self.mu = nnx.Param(_initial_shift(self.model_width))
    down = (self.model_width, len(_SHIFTED), config.shift_rank)
    up = (len(_SHIFTED), config.shift_rank, self.model_width)
    self.shift_down = nnx.Param(jnp.zeros(down, jnp.float32))
    self.shift_up = nnx.Param(
      jax.random.uniform(rngs.params(), up, jnp.float32, -_UP_BOUND, _UP_BOUND)
    )
    self.r_proj = self._linear(width, rngs)
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.gate_proj = self._linear(width, rngs)
    self.o_proj = self._linear(self.model_width, rngs, width)
    self.w_proj = low_rank.LowRank(
      self.model_width,
      config.decay_rank,
      width,
      activation=jnp.tanh,
      use_bias=True,
      dtype=self.dtype,
      rngs=rngs,
    )
    slope = jnp.linspace(0, 1, width)
    self.w_proj.up.bias.set_value(-6 + 5 * slope ** (0.7 + 1.3 * _MIDDLE))
    zigzag = (jnp.arange(width) + 1) % 3 - 1
    bonus = _MIDDLE * (1 - slope) + 0.1 * zigzag.astype(jnp.float32)
    self.bonus = nnx.Param(bonus.reshape(self.num_heads, self.head_dim))
    self.head_norm = norm.HeadNorm(self.num_heads, self.head_dim, eps=_NORM_EPS)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V]."""
    return self._zeros(batch, self.num_heads, self.head_dim, self.head_dim)

  def _mixed_inputs(self, x, before) -> dict[str, jax.Array]:
    """Returns x_c [B, T, D] by the name of its use."""
    difference = before - x
    mu, down, up = (
      p[...].astype(x.dtype) for p in (self.mu, self.shift_down, self.shift_up)
    )
    m = x + difference * mu[0][None, None]
    hidden = jnp.tanh(jnp.einsum('btd,dcr->btcr', m, down))
    share = jnp.einsum('btcr,crd->cbtd', hidden, up) + mu[1:, None, None]
    mixed = x[None] + difference[None] * share
    return dict(zip(_SHIFTED, mixed, strict=True))

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    mixed = self._mixed_inputs(x, past.local('shift', x))
    r = self._split_heads(self.r_proj(mixed['r']))
    k = self._split_heads(self.k_proj(mixed['k']))
    v = self._split_heads(self.v_proj(mixed['v']))
    w = self._split_heads(self.w_proj(mixed['w'])).astype(jnp.float32)
    bonus = self.bonus[...]
    o = past.recur(
      functools.partial(linear_attention, bonus=bonus),
      functools.partial(linear_attention_step, bonus=bonus),
      r,
      k,
      v,
      -jnp.exp(w),
      scale=1.0,
    )
    o = self.head_norm(o).reshape(*x.shape[:2], -1)  # [B, T, H V]
    return self.o_proj(o * jax.nn.silu(self.gate_proj(mixed['g'])))
