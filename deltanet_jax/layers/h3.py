"""H3: Fu et al., arXiv 2212.14052.

Form as in https://github.com/HazyResearch/safari, src/models/sequence/h3.py at
commit fc2d8b18be36bce427a4b9b8073e508c86c8f7ee, with the S4D kernel of Gu et
al., arXiv 2206.11893 (S4D-Lin). The differences from it:

* the diagonal state space model is scanned (see `selective_scan`) and not
  expanded to a filter: the same sum, exact over documents, with a state of
  constant size to decode from;
* the shift state space model is the convolution of `shift_width` taps that it
  is, its skip included; its taps start uniform, as all short convolutions here;
* its discretisation is the zero-order hold, and B is 1;
* the projections have no bias and start as N(0, 0.02^2), as everywhere here.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from deltanet_jax.layers import selective_scan
from deltanet_jax.layers import short_conv

_DT_MIN, _DT_MAX = 1e-3, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class H3Config:
  """Options of the `h3` mixer.

  Attributes:
    state_size: complex states N of a channel.
    shift_width: taps of the keys' convolution.
    head_width: channels d of a head; products of keys and values have d^2 per
      head. The model has model_width / d heads.
    chunk_size: tokens that are scanned at once; 0: 16.
  """

  state_size: int = 32
  shift_width: int = 64
  head_width: int = 1
  chunk_size: int = 0

  def __post_init__(self):
    options.require_at_least(self, 1, 'state_size', 'shift_width', 'head_width')
    options.require_at_least(self, 0, 'chunk_size')


class H3(recurrence.Recurrent):
  """Products of queries with a state space model of keys times values.

  With q, k, v the projections of x into H heads of d channels, and N complex
  modes per head, rates A_n = -exp(log_rate_n) + i frequency_n and steps dt,

      k <- convolution of k over shift_width tokens
      h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A  k_t v_t^T     [d, d, N]
      S_t = 2 Re sum_n C_n h_t,n + skip k_t v_t^T                  [d, d]
      y = concat_heads(S_t^T q_t) W_o

  State: D d N complex numbers, as pairs of float32.
  """

  config_class = H3Config

  def _build(self, rngs: nnx.Rngs) -> None:
    config, width = self.config, self.model_width
    if width % config.head_width:
      raise ValueError(
        'model_width must be a multiple of head_width, got '
        f'{width} and {config.head_width}'
      )
    heads = self.num_kernels = width // config.head_width
    self.q_proj = self._linear(width, rngs)
    self.k_proj = self._linear(width, rngs)
    self.v_proj = self._linear(width, rngs)
    self.o_proj = self._linear(width, rngs)
    self.k_conv = short_conv.ShortConv(
      width, width=config.shift_width, dtype=self.dtype, rngs=rngs
    )
    modes = (heads, config.state_size)
    self.log_dt = nnx.Param(
      jax.random.uniform(
        rngs.params(), (heads,), jnp.float32, jnp.log(_DT_MIN), jnp.log(_DT_MAX)
      )
    )
    self.log_rate = nnx.Param(jnp.full(modes, jnp.log(0.5), jnp.float32))
    frequency = jnp.pi * jnp.arange(config.state_size, dtype=jnp.float32)
    self.frequency = nnx.Param(jnp.tile(frequency[None], (heads, 1)))
    self.c = nnx.Param(
      jax.random.normal(rngs.params(), (*modes, 2), jnp.float32) * 0.5**0.5
    )
    self.skip = nnx.Param(
      jax.random.normal(rngs.params(), (heads,), jnp.float32)
    )

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H d d, N, 2]."""
    products = self.model_width * self.config.head_width
    return self._zeros(batch, products, self.config.state_size, 2)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    heads = self.num_kernels
    q = self._split_heads(self.q_proj(x), heads)
    k = self._split_heads(past.local('k_conv', self.k_proj(x)), heads)
    v = self._split_heads(self.v_proj(x), heads)
    products = k[..., :, None] * v[..., None, :]  # [B, T, H, d, d]
    u = products.reshape(*x.shape[:2], -1).astype(jnp.float32)
    y = self._state_space(u, past).reshape(products.shape)
    skip = self.skip[...][None, None, :, None, None]
    y = y + skip * products.astype(jnp.float32)
    o = jnp.einsum('bthk,bthkv->bthv', q.astype(jnp.float32), y)
    return self.o_proj(o.astype(x.dtype).reshape(x.shape))

  def _modes(self) -> tuple[jax.Array, jax.Array]:
    """Returns exp(dt A) and C (exp(dt A) - 1) / A per product [H d d, N]."""
    rate = jax.lax.complex(-jnp.exp(self.log_rate[...]), self.frequency[...])
    dt = jnp.exp(self.log_dt[...])[:, None].astype(rate.dtype)
    decay = jnp.exp(dt * rate)
    c = self.c[...]
    read = jax.lax.complex(c[..., 0], c[..., 1]) * (decay - 1) / rate
    repeats = self.config.head_width**2
    return jnp.repeat(decay, repeats, axis=0), jnp.repeat(read, repeats, axis=0)

  def _state_space(self, u: jax.Array, past: recurrence.Past) -> jax.Array:
    """Maps u [B, T, H d d] to 2 Re sum C h; advances the state."""
    decay, read = self._modes()
    tokens = past.tokens
    if tokens is None:
      tokens = jnp.ones(u.shape[:2], bool)

    def chunk(state, inputs):
      (u, is_token), keep = inputs
      state = jax.lax.complex(state[..., 0], state[..., 1])
      is_token = is_token[..., None, None]
      decays = jnp.where(is_token, decay[None, None], 1)
      write = jnp.where(is_token, u[..., None], 0).astype(decay.dtype)
      write = jnp.broadcast_to(write, decays.shape)
      states = selective_scan.advance(state, decays, write, keep)
      y = 2 * jnp.sum(states * read[None, None], axis=-1).real
      return jnp.stack([states[-1].real, states[-1].imag], axis=-1), y

    y, past.state = selective_scan.scan_in_chunks(
      chunk, past.state, (u, tokens), past.resets, self.config.chunk_size
    )
    return y
