"""Mamba (S6): Gu and Dao, arXiv 2312.00752.

Form as in https://github.com/state-spaces/mamba,
mamba_ssm/modules/mamba_simple.py. The differences from it:

* the one input projection is two, the one to dt, B and C three, and these start
  as N(0, 0.02^2), but that of dt as there;
* the official model is a stack of these layers without MLP, twice as deep
  (`ModelConfig.use_mlp=False`); here they may also take a block with one.
"""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import gates
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from deltanet_jax.layers import selective_scan


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig:
  """Options of the `mamba` mixer.

  Attributes:
    expansion: inner width, in multiples of the model's.
    state_size: states N of an inner channel.
    dt_rank: rank of the step size's projection; 0: model_width / 16, rounded
      up.
    use_short_conv: causal depthwise convolution before the recurrence.
    conv_width: taps of that convolution.
    chunk_size: tokens that are scanned at once; 0: 16.
  """

  expansion: int = 2
  state_size: int = 16
  dt_rank: int = 0
  use_short_conv: bool = True
  conv_width: int = 4
  chunk_size: int = 0

  def __post_init__(self):
    options.require_at_least(self, 1, 'expansion', 'state_size', 'conv_width')
    options.require_at_least(self, 0, 'dt_rank', 'chunk_size')


class Mamba(recurrence.Recurrent):
  """A selective state space model per channel; heads play no part.

  With E = expansion D channels and N states,

      u = SiLU(conv(x W_u))
      dt = softplus(u W_r W_dt + b)      B = u W_B      C = u W_C
      h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t^T,  A = -exp(A_log) [E, N]
      y = ((h_t C_t + d u_t) SiLU(x W_z)) W_o

  State: E N numbers.
  """

  config_class = MambaConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    config = self.config
    inner = self.inner_dim = config.expansion * self.model_width
    rank = config.dt_rank or math.ceil(self.model_width / 16)
    self.u_proj = self._linear(inner, rngs)
    self.z_proj = self._linear(inner, rngs)
    self.rank_proj = self._linear(rank, rngs, inner)
    self.b_proj = self._linear(config.state_size, rngs, inner)
    self.c_proj = self._linear(config.state_size, rngs, inner)
    self.dt_proj = self._linear(inner, rngs, rank, use_bias=True)
    bound = rank**-0.5
    self.dt_proj.kernel.set_value(
      jax.random.uniform(
        rngs.params(), (rank, inner), jnp.float32, -bound, bound
      )
    )
    self.dt_proj.bias.set_value(gates.initial_dt_bias(rngs, (inner,))[...])
    rates = jnp.arange(1, config.state_size + 1, dtype=jnp.float32)
    self.a_log = nnx.Param(jnp.log(jnp.tile(rates[None], (inner, 1))))
    self.skip = nnx.Param(jnp.ones((inner,), jnp.float32))
    self.o_proj = self._linear(self.model_width, rngs, inner)
    if config.use_short_conv:
      self.conv = self._short_conv(inner, rngs, use_bias=True)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, E, N]."""
    return self._zeros(batch, self.inner_dim, self.config.state_size)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    u = jax.nn.silu(past.local('conv', self.u_proj(x)))
    raw = self.dt_proj(self.rank_proj(u)).astype(jnp.float32)
    dt = jax.nn.softplus(raw)  # [B, T, E]
    if past.tokens is not None:
      dt = jnp.where(past.tokens[..., None], dt, 0)
    y, past.state = selective_scan.selective_scan(
      u,
      dt,
      -jnp.exp(self.a_log[...]),
      self.b_proj(u),
      self.c_proj(u),
      initial_state=past.state,
      resets=past.resets,
      chunk_size=self.config.chunk_size,
    )
    y = y + self.skip[...][None, None] * u.astype(jnp.float32)
    return self.o_proj(y.astype(u.dtype) * jax.nn.silu(self.z_proj(x)))
