"""Hyena (Poli et al., arXiv 2302.10866) and its multi-head form (2310.18780).

Form as in https://github.com/HazyResearch/safari, src/models/sequence/hyena.py
at commit c1b5c7bcaceaf556e5b0327733a85079ec9fc431, and for the multi-head form
https://github.com/athms/mad-lab, mad/model/layers/hyena.py at commit
6e7e4c903b7d4d1a31d12186b709f36fa3184041. The differences from them:

* the filter is defined on `filter_length` tokens and zero beyond, at any length
  of the input (there: no longer inputs); so a ring of as many tokens decodes;
* positions of the filter network are constants (there: trained, very slowly);
* the projections have no bias and start as N(0, 0.02^2), as everywhere here;
* mad-lab's ties the projections in groups; here, as in safari, each is its own.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import long_conv
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence

_FAST, _SLOW, _TARGET = 0.3, 1.5, 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class HyenaConfig:
  """Options of the `hyena` mixer.

  Attributes:
    order: projections that gate, at least 2; one filter fewer.
    filter_length: tokens that a filter reaches back, its own included.
    filter_width: width of the network that gives the filter.
    filter_layers: hidden layers of that network beyond the first.
    num_bands: frequencies of the positions that it gets.
    conv_width: taps of the short convolution after the projections.
  """

  order: int = 2
  filter_length: int = 2048
  filter_width: int = 64
  filter_layers: int = 2
  num_bands: int = 1
  conv_width: int = 3

  def __post_init__(self):
    options.require_at_least(self, 2, 'order', 'filter_length')
    options.require_at_least(self, 1, 'filter_width', 'num_bands', 'conv_width')
    options.require_at_least(self, 0, 'filter_layers')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiheadHyenaConfig(HyenaConfig):
  """Options of the `multihead_hyena` mixer.

  Attributes:
    order: always 2.
    filter_length: as of `hyena`.
    filter_width: as of `hyena`.
    filter_layers: as of `hyena`.
    num_bands: as of `hyena`.
    conv_width: as of `hyena`.
    head_width: channels d of a head; the model has model_width / d heads.
  """

  head_width: int = 16

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'head_width')
    if self.order != 2:
      raise ValueError(f'order of multihead_hyena must be 2, got {self.order}')


class Filter(nnx.Module):
  """h_s = exp(-s |delta| / L) network(position of s), per channel.

  The network has sine activations of a learned frequency per unit; the rates
  delta are spread so that a channel falls to 0.01 after 0.3 to 1.5 filters.
  """

  def __init__(self, channels: int, config: HyenaConfig, *, rngs: nnx.Rngs):
    self.length = config.filter_length
    self.num_bands = config.num_bands
    self.channels = channels
    width = config.filter_width
    sizes = [1 + 2 * config.num_bands] + [width] * (1 + config.filter_layers)

    def uniform(shape, fan_in):
      bound = fan_in**-0.5
      return nnx.Param(
        jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
      )

    self.num_layers = len(sizes) - 1
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
      setattr(self, f'kernel_{i}', uniform((fan_in, fan_out), fan_in))
      setattr(self, f'bias_{i}', uniform((fan_out,), fan_in))
    self.frequency = nnx.Param(jnp.ones((width,), jnp.float32))
    self.output = uniform((width, channels), width)

  def _positions(self) -> jax.Array:
    """Returns [L, 1 + 2 bands]: time, cosines and sines."""
    t = jnp.linspace(0, 1, self.length)[:, None]
    turns = jnp.arange(self.length, dtype=jnp.float32) / self.length
    bands = jnp.linspace(1e-4, self.num_bands - 1, self.num_bands)
    angles = 2 * jnp.pi * turns[:, None] * bands[None]
    return jnp.concatenate([t, jnp.cos(angles), -jnp.sin(angles)], axis=1)

  def __call__(self) -> jax.Array:
    """Returns the filter, float32 [L, C]."""
    z = self._positions()
    frequency = self.frequency[...][None]
    for i in range(self.num_layers):
      kernel, bias = getattr(self, f'kernel_{i}'), getattr(self, f'bias_{i}')
      z = jnp.sin(frequency * (z @ kernel[...] + bias[...][None]))
    rates = jnp.linspace(1 / _SLOW, 1 / _FAST, self.channels)
    t = jnp.linspace(0, 1, self.length)[:, None]
    window = jnp.exp(jnp.log(_TARGET) * t * rates[None])
    return window * (z @ self.output[...])


class FilteredConv(nnx.Module):
  """y = h * x + d x with a `Filter` h, over one channel after another."""

  def __init__(self, channels: int, config: HyenaConfig, *, dtype, rngs):
    self.channels = channels
    self.dtype = dtype
    self.filter = Filter(channels, config, rngs=rngs)
    self.skip = nnx.Param(
      jax.random.normal(rngs.params(), (channels,), jnp.float32)
    )

  def init_cache(self, batch: int) -> long_conv.LongConvCache:
    """Returns the cache of rows that have seen no token."""
    return long_conv.empty_cache(
      batch, self.filter.length, self.channels, self.dtype
    )

  def _expand(self, x):
    return x

  def __call__(self, x, *, segment_ids=None, cache=None):
    """Convolves x [B, T, C]; arguments and results as of `short_conv`."""
    h = self.filter()
    h = h.at[0].add(self.skip[...])
    y, cache = long_conv.run(
      x, h, expand=self._expand, segment_ids=segment_ids, cache=cache
    )
    return y.astype(x.dtype), cache


class Hyena(recurrence.Recurrent):
  """Gated long convolutions.

  With N + 1 = order + 1 projections of x that pass a short convolution,
  x_0 .. x_{N-1} and v, and filters h_1 .. h_{N-1} with skips d,

      v <- h_i * (x_i v) + d_i (x_i v)      i = N - 1 .. 1
      y = (x_0 v) W_o

  There is no state; the cache is a ring of filter_length tokens per filter.
  """

  config_class = HyenaConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    order, width = self.config.order, self.model_width
    self.in_proj = self._linear((order + 1) * width, rngs)
    self.o_proj = self._linear(width, rngs)
    self.short_conv = self._short_conv((order + 1) * width, rngs, use_bias=True)
    for i in range(1, order):
      conv = FilteredConv(width, self.config, dtype=self.dtype, rngs=rngs)
      setattr(self, f'long_conv_{i}', conv)

  def empty_state(self, batch: int) -> tuple[()]:
    """Returns nothing: the caches of the convolutions hold all there is."""
    del batch
    return ()

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    streams = past.local('short_conv', self.in_proj(x))
    *gates, v = jnp.split(streams, self.config.order + 1, axis=-1)
    for i in reversed(range(1, self.config.order)):
      v = past.local(f'long_conv_{i}', gates[i] * v)
    return self.o_proj(gates[0] * v)


class _HeadConv(FilteredConv):
  """`FilteredConv` of outer products k v^T, one filter per head."""

  def __init__(self, model_width: int, config, *, dtype, rngs):
    self.width = config.head_width
    heads = model_width // self.width
    super().__init__(heads, config, dtype=dtype, rngs=rngs)
    self.model_width = model_width

  def init_cache(self, batch: int) -> long_conv.LongConvCache:
    return long_conv.empty_cache(
      batch, self.filter.length, 2 * self.model_width, self.dtype
    )

  def _expand(self, x):
    """Maps keys and values [B, T, 2 D] to products [B, T, H d d]."""
    heads = (*x.shape[:2], self.channels, self.width)
    k, v = (y.reshape(heads) for y in jnp.split(x, 2, axis=-1))
    return (k[..., :, None] * v[..., None, :]).reshape(*x.shape[:2], -1)

  def __call__(self, x, *, segment_ids=None, cache=None):
    """Maps keys and values [B, T, 2 D] to [B, T, H, d, d]."""
    h = self.filter().at[0].add(self.skip[...])
    h = jnp.repeat(h, self.width**2, axis=1)
    y, cache = long_conv.run(
      x, h, expand=self._expand, segment_ids=segment_ids, cache=cache
    )
    products = (*x.shape[:2], self.channels, self.width, self.width)
    return y.reshape(products).astype(x.dtype), cache


class MultiheadHyena(recurrence.Recurrent):
  """Long convolutions of outer products: a filter per head.

  With q, k, v from projections of x that pass a short convolution, H heads of
  d channels, a filter h and a skip per head,

      S_t = sum_s h_s k_{t-s} v_{t-s}^T + skip k_t v_t^T        [d, d]
      y = concat_heads(S_t^T q_t) W_o

  There is no state; the cache is a ring of filter_length keys and values.
  """

  config_class = MultiheadHyenaConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    width = self.model_width
    if width % self.config.head_width:
      raise ValueError(
        'model_width must be a multiple of head_width, got '
        f'{width} and {self.config.head_width}'
      )
    self.in_proj = self._linear(3 * width, rngs)
    self.o_proj = self._linear(width, rngs)
    self.short_conv = self._short_conv(3 * width, rngs, use_bias=True)
    self.long_conv = _HeadConv(width, self.config, dtype=self.dtype, rngs=rngs)

  def empty_state(self, batch: int) -> tuple[()]:
    """Returns nothing: the caches of the convolutions hold all there is."""
    del batch
    return ()

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    streams = past.local('short_conv', self.in_proj(x))
    q, k_v = jnp.split(streams, [self.model_width], axis=-1)
    products = past.local('long_conv', k_v)  # [B, T, H, d, d]
    q = q.reshape(*products.shape[:-1])
    o = jnp.einsum('bthk,bthkv->bthv', q, products)
    return self.o_proj(o.reshape(*x.shape[:2], -1))
