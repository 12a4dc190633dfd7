"""HGRN2: Qin et al., arXiv 2404.07904.

Form as in https://github.com/OpenNLPLab/HGRN2 and
https://github.com/fla-org/flash-linear-attention, fla/layers/hgrn2.py at commit
0315a70ea55304398ad372e56cdd211ce0119571. The differences from them:

* the lower bound of the decays, there a cumulative softmax over the layers of
  one learned table, is learned by every layer for itself, as sigmoid(bound),
  1/2 at first: what the middle layer has there;
* projections start as N(0, 0.02^2), as everywhere in this package;
* the output is divided by sqrt(K), as in the second, before its norm.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class HGRN2Config(options.RecurrenceConfig):
  """Options of the `hgrn2` mixer.

  Attributes:
    use_lower_bound: decays stay above a learned bound; False: above 0.
    use_short_conv: causal depthwise convolution after the projections.
    conv_width: taps of that convolution.
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  use_lower_bound: bool = True
  use_short_conv: bool = False
  conv_width: int = 4

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'conv_width')


class HGRN2(recurrence.Recurrent):
  """Linear attention whose key is what the decay leaves room for.

  With H heads of width K = V = head_dim and b = sigmoid(bound), or 0,

      alpha = b + (1 - b) sigmoid(x W_f)        q = SiLU(x W_q)
      S_t = Diag(alpha_t) S_{t-1} + (1 - alpha_t) (x_t W_v)^T
      y = RMSNorm(S_t^T q_t / sqrt(K)) W_o

  with the norm over all heads. State: H K V numbers.
  """

  config_class = HGRN2Config

  def _build(self, rngs: nnx.Rngs) -> None:
    width = self.num_heads * self.head_dim
    self.q_proj = self._linear(width, rngs)
    self.f_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.o_proj = self._linear(self.model_width, rngs, width)
    if self.config.use_lower_bound:
      self.bound = nnx.Param(jnp.zeros((width,)))
    if self.config.use_short_conv:
      self.q_conv = self._short_conv(width, rngs)
      self.f_conv = self._short_conv(width, rngs)
      self.v_conv = self._short_conv(width, rngs)
    self.norm = norm.RMSNorm(width, eps=self.norm_eps)

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H, K, V]."""
    return self._zeros(batch, self.num_heads, self.head_dim, self.head_dim)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q = jax.nn.silu(past.local('q_conv', self.q_proj(x)))
    f = past.local('f_conv', self.f_proj(x)).astype(jnp.float32)
    v = past.local('v_conv', self.v_proj(x))
    k = jax.nn.sigmoid(-f)  # 1 - alpha without bound, exact near 0.
    if self.config.use_lower_bound:
      k = k * jax.nn.sigmoid(-self.bound[...])[None, None]
    g = jnp.log1p(-jnp.minimum(k, 1 - jnp.finfo(jnp.float32).eps))
    q, k, v, g = (self._split_heads(y) for y in (q, k.astype(q.dtype), v, g))
    o = past.recur(
      linear_attention, linear_attention_step, q, k, v, g, scale=None
    )
    return self.o_proj(self.norm(o.reshape(*x.shape[:2], -1)))
