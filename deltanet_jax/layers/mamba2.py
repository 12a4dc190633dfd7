"""Mamba-2: Dao and Gu, arXiv 2405.21060.

Form as in https://github.com/state-spaces/mamba,
mamba_ssm/modules/mamba2_simple.py at commit
20ddb822efe7436957f09712d0f7260b898d8c57. The differences from it:

* the one input projection is five, and these start as N(0, 0.02^2);
* heads are given by their number, not by their width; that is `expansion`
  head_dim, 64 or 128 there.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import gates
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(options.RecurrenceConfig):
  """Options of the `mamba2` mixer.

  Attributes:
    expansion: inner width of a head, in multiples of head_dim.
    state_size: width N of B and C, the keys and queries.
    num_groups: pairs of B and C, each serving as many heads.
    conv_width: taps of the convolution before the recurrence.
    use_short_conv: False leaves that convolution out.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  expansion: int = 2
  state_size: int = 128
  num_groups: int = 1
  conv_width: int = 4
  use_short_conv: bool = True

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(
      self, 1, 'expansion', 'state_size', 'num_groups', 'conv_width'
    )


class Mamba2(recurrence.Recurrent):
  """Linear attention with a decay per head that also scales the write.

  With H heads of width P = expansion head_dim that share one B and C per group,

      u, B, C = SiLU(conv(x W_u, x W_B, x W_C))
      dt = softplus(x W_dt + dt_bias)        a = -exp(A_log)
      S_t = exp(dt_t a) S_{t-1} + B_t (dt_t u_t)^T
      o_t = S_t^T C_t + d u_t
      y = RMSNorm(o SiLU(x W_z)) W_o

  with the norm over all heads. State: H N P numbers.
  """

  config_class = Mamba2Config

  def _build(self, rngs: nnx.Rngs) -> None:
    config, heads = self.config, self.num_heads
    if heads % config.num_groups:
      raise ValueError(
        'num_heads must be a multiple of num_groups, got '
        f'{heads} and {config.num_groups}'
      )
    self.inner_dim = config.expansion * self.head_dim
    inner, keys = heads * self.inner_dim, config.num_groups * config.state_size
    self.z_proj = self._linear(inner, rngs)
    self.u_proj = self._linear(inner, rngs)
    self.b_proj = self._linear(keys, rngs)
    self.c_proj = self._linear(keys, rngs)
    self.dt_proj = self._linear(heads, rngs)
    self.o_proj = self._linear(self.model_width, rngs, inner)
    self.a_log = gates.initial_rates(rngs, (heads,), 1, 16)
    self.dt_bias = gates.initial_dt_bias(rngs, (heads,))
    self.skip = nnx.Param(jnp.ones((heads,)))
    if config.use_short_conv:
      self.conv = self._short_conv(inner + 2 * keys, rngs, use_bias=True)
    self.norm = norm.RMSNorm(inner, eps=self.norm_eps)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, N, P]."""
    return self._zeros(
      batch, self.num_heads, self.config.state_size, self.inner_dim
    )

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    inner = self.num_heads * self.inner_dim
    groups = self.config.num_groups
    streams = (self.u_proj(x), self.b_proj(x), self.c_proj(x))
    ubc = past.local('conv', jnp.concatenate(streams, axis=-1))
    u, b, c = jnp.split(
      jax.nn.silu(ubc), (inner, inner + streams[1].shape[-1]), axis=-1
    )
    u = self._split_heads(u)
    b, c = (self._split_heads(y, groups) for y in (b, c))
    raw = self.dt_proj(x).astype(jnp.float32)
    dt = jax.nn.softplus(raw + self.dt_bias[...][None, None])  # [B, T, H]
    g = -jnp.exp(self.a_log[...])[None, None] * dt
    v = u * dt.astype(u.dtype)[..., None]
    o = past.recur(
      linear_attention, linear_attention_step, c, b, v, g, scale=1.0
    )
    o = o + self.skip[...].astype(u.dtype)[None, None, :, None] * u
    o = o.reshape(*x.shape[:2], -1) * jax.nn.silu(self.z_proj(x))
    return self.o_proj(self.norm(o))
