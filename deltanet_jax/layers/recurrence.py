"""The frame of a mixer that is a recurrence over a state of constant size.

    class Example(recurrence.Recurrent):
      def _empty_state(self, batch): ...
      def _mix(self, x, past):
        k = past.local('k_conv', self.k_proj(x))
        o = past.recur(op, op_step, q, k, v, scale=1.0)
        return self.o_proj(o)

`Past` is what a call knows of the tokens before it, and collects what the next
call has to know; the documents of a row are kept apart here, for all mixers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from deltanet_jax.layers import mixer
from deltanet_jax.layers import segments
from deltanet_jax.layers import short_conv
from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_step

# The name under which `jax.checkpoint` knows what a recurrence returns.
OUTPUT = 'recurrence_output'


class RecurrentCache(NamedTuple):
  """What the rows remember: constant in size, whatever their length.

  Attributes:
    state: of the recurrence; arrays [B, ...].
    segment_id: int32 [B], the last document; 0 before the first token.
    local: pasts of short convolutions and the like, by attribute name.
  """

  state: Any
  segment_id: jax.Array
  local: dict[str, Any]


def select_rows(rows: jax.Array, chosen: Any, other: Any) -> Any:
  """Returns `chosen` where the bool rows [B] are True, else `other`."""

  def select(a, b):
    return jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

  return jax.tree.map(select, chosen, other)


class Past:
  """One call of a recurrent mixer; see the module.

  Attributes:
    ids: int32 [B, T], the document of every token, 0 is padding; None: every
      row is one document that starts here.
    given: the same as the ops of `pallas_kernels` take it: None: one document.
    state: of the recurrence before the first token, empty where that starts
      another document. A mixer that does not use `recur` sets the new one.
  """

  def __init__(self, layer: 'Recurrent', x, segment_ids, cache):
    batch, self.length, _ = x.shape
    empty = layer.empty_state(batch)
    self.given = self.ids = segment_ids
    self.state = empty
    self._cache = cache
    self._layer = layer
    self._new_local = {}
    if cache is None:
      return
    if segment_ids is None:
      self.ids = segments.continued_ids(cache.segment_id, self.length)
    first = segments.first_id(self.ids)
    goes_on = (first == 0) | (first == cache.segment_id)
    self.state = select_rows(goes_on, cache.state, empty)

  @property
  def resets(self) -> jax.Array | None:
    """Bool [B, T]: the token starts another document than the one before it."""
    if self.given is None:
      return None
    return segments.resets(self.given)

  @property
  def tokens(self) -> jax.Array | None:
    """Bool [B, T]: the token is not padding; None: none is."""
    return None if self.given is None else self.given != 0

  def local(self, name: str, x: Any) -> Any:
    """Runs the mixer's local layer of that name, x itself if it has none."""
    layers = self._layer.local_layers()
    if name not in layers:
      return x
    past = None if self._cache is None else self._cache.local[name]
    y, self._new_local[name] = layers[name](x, segment_ids=self.ids, cache=past)
    return y

  def recur(
    self,
    op: Callable,
    step: Callable,
    *arrays: jax.Array | None,
    **settings: Any,
  ) -> jax.Array:
    """Runs an op of `pallas_kernels`; its state goes from call to call.

    Args:
      op: computes a sequence.
      step: computes one token.
      *arrays: what both take first, here [B, T, ...]; or None.
      **settings: what both take besides, such as `scale`.

    Returns:
      o [B, T, H, V], 0 at padding.
    """
    if self.length == 1 and self._cache is not None:
      return self._step(step, arrays, settings)
    o, self.state = op(
      *arrays,
      **settings,
      initial_state=self.state,
      segment_ids=self.given,
      **self._layer.op_options,
    )
    return checkpoint_name(o, OUTPUT)

  def recur_with_normalizer(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    *,
    scale: float | None,
  ) -> tuple[jax.Array, jax.Array]:
    """Runs linear attention and what normalises it, as one more value column.

    Returns:
      o [B, T, H, V] and z [B, T, H], the outputs for a value of 1. The state is
      [B, H, K, V + 1].
    """
    ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
    v = jnp.concatenate([v, ones], axis=-1)
    o = self.recur(
      linear_attention, linear_attention_step, q, k, v, g, scale=scale
    )
    return o[..., :-1], o[..., -1]

  def _step(self, step, arrays, settings):
    token = jax.tree.map(lambda x: x[:, 0], arrays)
    o, state = step(*token, state=self.state, **settings)
    if self.given is not None:
      is_token = self.given[:, 0] != 0
      state = select_rows(is_token, state, self.state)
      o = select_rows(is_token, o, jnp.zeros_like(o))
    self.state = state
    return o[:, None]

  def cache(self) -> RecurrentCache | None:
    """Returns what the next call needs; None without a cache."""
    if self._cache is None:
      return None
    last = segments.last_id(self.ids, self._cache.segment_id)
    return RecurrentCache(self.state, last, self._new_local)


class Recurrent(mixer.Mixer):
  """A mixer whose memory is a state of constant size; see the module."""

  def empty_state(self, batch: int) -> Any:
    """Returns the state before a document's first token."""
    raise NotImplementedError

  def _mix(self, x: jax.Array, past: Past) -> jax.Array:
    raise NotImplementedError

  @property
  def op_options(self) -> dict[str, Any]:
    """The options of `pallas_kernels` ops that the configuration sets."""
    return {
      'chunk_size': self.config.chunk_size or None,
      'implementation': self.config.implementation or None,
    }

  def local_layers(self) -> dict[str, Any]:
    """Returns the layers of this one that have a cache of their own."""
    return {
      name: layer
      for name, layer in vars(self).items()
      if hasattr(layer, 'init_cache')
    }

  def init_cache(self, batch: int) -> RecurrentCache:
    """Returns the cache of `batch` rows that have seen no token."""
    local = {
      name: layer.init_cache(batch)
      for name, layer in self.local_layers().items()
    }
    return RecurrentCache(
      self.empty_state(batch), jnp.zeros((batch,), jnp.int32), local
    )

  def _short_conv(self, features: int, rngs, *, use_bias: bool = False):
    """Returns a short convolution of the configured width."""
    return short_conv.ShortConv(
      features,
      width=self.config.conv_width,
      use_bias=use_bias,
      dtype=self.dtype,
      rngs=rngs,
    )

  def _split_heads(self, x: jax.Array, num_heads: int = 0) -> jax.Array:
    """Cuts x [B, T, H K] into heads [B, T, H, K]."""
    return x.reshape(*x.shape[:2], num_heads or self.num_heads, -1)

  def _zeros(self, batch: int, *shape: int) -> jax.Array:
    """Returns a float32 state [B, ...] of zeros."""
    return jnp.zeros((batch, *shape), jnp.float32)

  def __call__(
    self,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: RecurrentCache | None = None,
  ) -> tuple[jax.Array, RecurrentCache | None]:
    """Mixes the tokens of every row.

    Args:
      x: [B, T, D].
      segment_ids: int32 [B, T]: the document of every token, 0 is padding;
        None: the row's last document goes on.
      cache: what the rows remember; None: they start here.

    Returns:
      y [B, T, D] in the layer's dtype, 0 at padding, and the new cache (None
      without one).

    Raises:
      ValueError: a shape does not fit, or the cache is of another batch or
        mixer.
    """
    self._check_call(x, segment_ids, cache)
    if segment_ids is not None:
      segment_ids = jnp.asarray(segment_ids, jnp.int32)
    past = Past(self, x, segment_ids, cache)
    y = self._mix(x, past)
    if past.tokens is not None:
      y = jnp.where(past.tokens[..., None], y, 0)
    return y, past.cache()
