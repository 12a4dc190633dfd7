"""RetNet: Sun et al., arXiv 2307.08621.

Form as in https://github.com/microsoft/torchscale (retnet) and
https://github.com/fla-org/flash-linear-attention,
fla/layers/multiscale_retention.py at commit
17423c96d38f03946c1cb8431ad7eee3bc6ae73f. The differences from them:

* projections start as N(0, 0.02^2), as everywhere in this package;
* the norm of a head has a learned scale, as in the second (the first has none);
* rotary frequencies are 10000^(-2i/K), as in the second.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from deltanet_jax.layers import rotary
from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetNetConfig(options.RecurrenceConfig):
  """Options of the `retnet` mixer.

  Attributes:
    value_expansion: value width of a head, in multiples of head_dim.
    rope_base: base of the rotary frequencies.
    use_short_conv: causal depthwise convolution and SiLU after the q, k, v
      projections.
    conv_width: taps of that convolution.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  value_expansion: int = 2
  rope_base: float = 10_000.0
  use_short_conv: bool = False
  conv_width: int = 4

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'value_expansion', 'conv_width')
    options.require_above(self, 0, 'rope_base')


class RetNet(recurrence.Recurrent):
  """Linear attention with rotary positions and a fixed decay per head.

  With q, k, v the projections of x into H heads, keys of width K, values of
  width V = value_expansion K,

      gamma_h = 1 - 2^(-5 - h), h = 0 .. H - 1
      S_t = gamma S_{t-1} + rotate(k_t) v_t^T
      y = (RMSNorm(S_t^T rotate(q_t) / sqrt(K)) SiLU(x W_gate)) W_o

  State: H K V numbers.
  """

  config_class = RetNetConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    self.value_dim = self.config.value_expansion * self.head_dim
    keys = self.num_heads * self.head_dim
    values = self.num_heads * self.value_dim
    rotary.frequencies(self.head_dim, self.config.rope_base)
    self.q_proj = self._linear(keys, rngs)
    self.k_proj = self._linear(keys, rngs)
    self.v_proj = self._linear(values, rngs)
    self.gate_proj = self._linear(values, rngs)
    self.o_proj = self._linear(self.model_width, rngs, values)
    if self.config.use_short_conv:
      self.q_conv = self._short_conv(keys, rngs)
      self.k_conv = self._short_conv(keys, rngs)
      self.v_conv = self._short_conv(values, rngs)
    self.positions = rotary.Positions()
    self.head_norm = norm.RMSNorm(self.value_dim, eps=self.norm_eps)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V]."""
    return self._zeros(batch, self.num_heads, self.head_dim, self.value_dim)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q = past.local('q_conv', self.q_proj(x))
    k = past.local('k_conv', self.k_proj(x))
    v = past.local('v_conv', self.v_proj(x))
    if self.config.use_short_conv:
      q, k, v = (jax.nn.silu(y) for y in (q, k, v))
    q, k, v = (self._split_heads(y) for y in (q, k, v))
    positions = past.local('positions', x)
    frequencies = rotary.frequencies(self.head_dim, self.config.rope_base)
    q, k = (rotary.rotate(y, positions, frequencies) for y in (q, k))
    heads = jnp.arange(self.num_heads, dtype=jnp.float32)
    g = jnp.log1p(-(2.0 ** (-5 - heads)))
    o = past.recur(
      functools.partial(linear_attention, g=g),
      functools.partial(linear_attention_step, g=g),
      q,
      k,
      v,
      scale=None,
    )
    o = self.head_norm(o).reshape(*x.shape[:2], -1)  # [B, T, H V]
    return self.o_proj(o * jax.nn.silu(self.gate_proj(x)))
