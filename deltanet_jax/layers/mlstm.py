"""mLSTM: Beck et al., "xLSTM", arXiv 2405.04517, in the form of xLSTM 7B.

Form as in https://github.com/NX-AI/xlstm, xlstm/xlstm_large/model.py at commit
00dc9e48362cca6d645f09aac8011156e3e775d4 (Beck et al., arXiv 2503.13427), which
leaves the feed-forward layer to the block, as this package does. The
differences from it:

* projections start as N(0, 0.02^2), as everywhere in this package;
* the norm of a head has a bias too.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from pallas_kernels import stabilized_gates

_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTMConfig(options.RecurrenceConfig):
  """Options of the `mlstm` mixer.

  Attributes:
    key_expansion: key width of a head, in multiples of head_dim.
    gate_cap: c of the gates' soft cap c tanh(x / c).
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  key_expansion: float = 0.5
  gate_cap: float = 15.0

  def __post_init__(self):
    super().__post_init__()
    options.require_above(self, 0, 'key_expansion', 'gate_cap')


class MLSTM(recurrence.Recurrent):
  """Linear attention with exponential input gates.

  With q, k, v the projections of x into H heads, values of width V = head_dim,
  keys of width K = key_expansion V, cap(x) = 15 tanh(x / 15),

      i = exp(cap(x W_i + b_i))        f = sigmoid(cap(x W_f + b_f))
      S_t = f_t S_{t-1} + i_t k_t v_t^T        z_t = f_t z_{t-1} + i_t k_t
      h_t = S_t^T q_t / max(|z_t^T q_t|, 1), q divided by sqrt(K)
      y = (sigmoid(x W_gate) HeadNorm(h)) W_o

  computed in the scale of the running maximum of the gates, which is part of
  the state. State: H (K V + K + 1) numbers.
  """

  config_class = MLSTMConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    factor = self.config.key_expansion
    self.key_dim = options.expand(self.head_dim, factor, 'key_expansion')
    keys = self.num_heads * self.key_dim
    values = self.num_heads * self.head_dim
    self.q_proj = self._linear(keys, rngs)
    self.k_proj = self._linear(keys, rngs)
    self.v_proj = self._linear(values, rngs)
    self.gate_proj = self._linear(values, rngs)
    self.o_proj = self._linear(self.model_width, rngs, values)
    self.i_proj = self._linear(self.num_heads, rngs, use_bias=True)
    self.f_proj = self._linear(self.num_heads, rngs, use_bias=True)
    self.i_proj.bias.set_value(jnp.full((self.num_heads,), -10, jnp.float32))
    self.f_proj.bias.set_value(jnp.linspace(3, 6, self.num_heads))
    self.head_norm = norm.HeadNorm(
      self.num_heads, self.head_dim, eps=self.norm_eps
    )

  def empty_state(self, batch: int) -> tuple[jax.Array, jax.Array]:
    """Returns zeros [B, H, K, V + 1] and the maximum of no gate, -inf."""
    state = self._zeros(batch, self.num_heads, self.key_dim, self.head_dim + 1)
    return state, jnp.full((batch, self.num_heads), -jnp.inf, jnp.float32)

  def _cap(self, x: jax.Array) -> jax.Array:
    cap = self.config.gate_cap
    return cap * jnp.tanh(x.astype(jnp.float32) / cap)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q, k, v = (
      self._split_heads(project(x))
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    past.state, maximum = past.state
    gates = stabilized_gates(
      jax.nn.log_sigmoid(self._cap(self.f_proj(x))),
      self._cap(self.i_proj(x)),
      initial_m=maximum,
      segment_ids=past.given,
    )
    k = k * gates.write[..., None].astype(k.dtype)
    o, z = past.recur_with_normalizer(q, k, v, gates.g, scale=None)
    past.state = (past.state, gates.m)
    z = jnp.maximum(jnp.abs(z.astype(jnp.float32)), gates.floor) + _EPS
    h = self.head_norm((o.astype(jnp.float32) / z[..., None]).astype(x.dtype))
    h = h.reshape(*x.shape[:2], -1)  # [B, T, H V]
    return self.o_proj(h * jax.nn.sigmoid(self.gate_proj(x)))
