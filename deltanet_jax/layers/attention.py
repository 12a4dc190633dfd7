"""Softmax attention, global and over a sliding window.

Transformer++ of the paper is Touvron et al., arXiv 2302.13971, form as in
https://github.com/fla-org/flash-linear-attention, fla/layers/attn.py at commit
033cef5eacbea6ac3ecf11341b7962f6257de4e0. The differences from it:

* the cache of `attention` has room for `cache_length` tokens, fixed beforehand;
* packed documents attend within themselves (there: unpadded to one long row);
* no option for biases in q, k, v.

On a mesh that shards the tokens of a row it is `ring_attention`.
"""

import dataclasses
from typing import Literal, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax import sharding
from deltanet_jax.layers import mixer
from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import ring_attention
from deltanet_jax.layers import rotary
from deltanet_jax.layers import segments

Backend = Literal['', 'xla', 'cudnn']
_CUDNN_HEAD_DIMS = range(8, 129, 8)  # It also wants even lengths.


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
  """What both mixers have; see `AttentionConfig`."""

  num_heads: int = 0
  num_kv_heads: int = 0
  rope_base: float = 10_000.0
  qk_norm: bool = False
  implementation: Backend = ''

  def __post_init__(self):
    options.require_at_least(self, 0, 'num_heads', 'num_kv_heads', 'rope_base')
    options.require_choice(self, 'implementation', Backend)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(AttentionOptions):
  """Options of the `attention` mixer.

  Attributes:
    num_heads: query heads, of width model_width / num_heads; 0: the model's
      heads and their width.
    num_kv_heads: key and value heads, each serving as many query heads; 0: as
      many as query heads.
    rope_base: base of the rotary frequencies; 0: no positions.
    qk_norm: RMSNorm of the queries and keys of a head.
    implementation: of `jax.nn.dot_product_attention`, `xla` or `cudnn` (the
      flash kernel of NVIDIA GPUs); empty: cudnn where it can.
    cache_length: tokens that a cache holds; the oldest are forgotten beyond.
  """

  cache_length: int = 2048

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'cache_length')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(AttentionOptions):
  """Options of the `sliding_window` mixer.

  Attributes:
    num_heads: as of `attention`.
    num_kv_heads: as of `attention`.
    rope_base: as of `attention`.
    qk_norm: as of `attention`.
    implementation: as of `attention`.
    window: tokens that a query sees, its own included. The paper does not state
      its window; 1024 is inferred from the state sizes on its poster.
  """

  window: int = 1024

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'window')


class AttentionCache(NamedTuple):
  """A ring of the last M tokens; position p is in slot p mod M.

  Attributes:
    k: [B, M, H, K] in the layer's dtype, rotated.
    v: [B, M, H, K].
    runs: int32 [B, M]: number of the document in its row; -1: no token.
    run: int32 [B], the number of the last document.
    segment_id: int32 [B], its id; 0 before the first token.
    position: int32, of the next token.
  """

  k: jax.Array
  v: jax.Array
  runs: jax.Array
  run: jax.Array
  segment_id: jax.Array
  position: jax.Array


class Attention(mixer.Mixer):
  """Grouped softmax attention with rotary positions.

  With x [B, T, D], H query heads, each sharing one of G key and value heads,

      q = rotate(x W_q)      k = rotate(x W_k)      v = x W_v
      y_t = sum_{s <= t} softmax_s(q_t k_s / sqrt(K)) v_s W_o

  over the tokens of the same document, the last W of them in the sliding form.
  State: 2 G K numbers per token, of at most `cache_length` tokens or W.
  """

  config_class = AttentionConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    config = self.config
    if config.num_heads:
      self.num_heads = config.num_heads
      self.head_dim = options.resolve_head_dim(
        self.model_width, self.num_heads, 0
      )
    self.num_kv_heads = config.num_kv_heads or self.num_heads
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        'num_heads must be a multiple of num_kv_heads, got '
        f'{self.num_heads} and {self.num_kv_heads}'
      )
    if config.rope_base:
      rotary.frequencies(self.head_dim, config.rope_base)
    kv_width = self.num_kv_heads * self.head_dim
    width = self.num_heads * self.head_dim
    self.q_proj = self._linear(width, rngs)
    self.k_proj = self._linear(kv_width, rngs)
    self.v_proj = self._linear(kv_width, rngs)
    self.o_proj = self._linear(self.model_width, rngs, width)
    if config.qk_norm:
      self.q_norm = norm.RMSNorm(self.head_dim, eps=self.norm_eps)
      self.k_norm = norm.RMSNorm(self.head_dim, eps=self.norm_eps)

  @property
  def window(self) -> int | None:
    """Tokens a query sees; None: all."""
    return None

  @property
  def cache_length(self) -> int:
    """Tokens the cache holds."""
    return self.config.cache_length

  def init_cache(self, batch: int) -> AttentionCache:
    """Returns the cache of `batch` rows that have seen no token."""
    shape = (batch, self.cache_length, self.num_kv_heads, self.head_dim)
    empty = jnp.zeros(shape, jnp.dtype(self.dtype))
    nothing = jnp.zeros((batch,), jnp.int32)
    return AttentionCache(
      k=empty,
      v=empty,
      runs=jnp.full(shape[:2], -1, jnp.int32),
      run=nothing,
      segment_id=nothing,
      position=jnp.zeros((), jnp.int32),
    )

  def __call__(
    self,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: AttentionCache | None = None,
  ) -> tuple[jax.Array, AttentionCache | None]:
    """Mixes the tokens of every row; see `recurrence.Recurrent.__call__`."""
    self._check_call(x, segment_ids, cache)
    if segment_ids is not None:
      segment_ids = jnp.asarray(segment_ids, jnp.int32)
    start = jnp.zeros((), jnp.int32) if cache is None else cache.position
    q, k, v = self._queries_keys_values(x, start)
    if cache is None:
      o = self._attend_alone(q, k, v, segment_ids)
    else:
      o, cache = self._attend_cached(q, k, v, segment_ids, cache)
    if segment_ids is not None:
      o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return self.o_proj(o.reshape(*x.shape[:2], -1)), cache

  def _queries_keys_values(self, x, start):
    """Returns q [B, T, H, K], k and v [B, T, G, K], q and k rotated."""
    q, k, v = (
      project(x).reshape(*x.shape[:2], -1, self.head_dim)
      for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    if self.config.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    if not self.config.rope_base:
      return q, k, v
    positions = start + jnp.arange(x.shape[1], dtype=jnp.int32)
    positions = jnp.broadcast_to(positions[None], x.shape[:2])
    frequencies = rotary.frequencies(self.head_dim, self.config.rope_base)
    q, k = (rotary.rotate(y, positions, frequencies) for y in (q, k))
    return q, k, v

  def _implementation(self, length: int) -> str:
    """Chooses where the configuration leaves it open."""
    if self.config.implementation:
      return self.config.implementation
    on_gpu = jax.default_backend() == 'gpu' and self.dtype == 'bfloat16'
    fits = self.head_dim in _CUDNN_HEAD_DIMS and length % 2 == 0
    return 'cudnn' if on_gpu and fits else 'xla'

  def _attend_alone(self, q, k, v, segment_ids):
    """Attends within the rows of one call."""
    mask = runs = None
    if segment_ids is not None:
      runs = segments.run_numbers(segment_ids)
    if sharding.ambient_size('sequence') > 1:
      if runs is not None:
        runs = jnp.where(segment_ids != 0, runs, -1)
      return ring_attention.ring_attention(q, k, v, runs, window=self.window)
    if runs is not None:
      mask = (segment_ids[:, None] != 0) & (runs[..., None] == runs[:, None])
      mask = mask[:, None]  # [B, 1, T, T]
    # What jax computes inside does not pass its own strict promotion.
    with jax.numpy_dtype_promotion('standard'):
      return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=True,
        local_window_size=self.window and (self.window - 1, 0),
        implementation=self._implementation(q.shape[1]),
      )

  def _attend_cached(self, q, k, v, segment_ids, cache):
    """Attends to the cache and to this call's tokens; returns o, the cache."""
    length = q.shape[1]
    ids = segment_ids
    if ids is None:
      ids = segments.continued_ids(cache.segment_id, length)
    known = jnp.concatenate([cache.segment_id[:, None], ids], axis=1)
    resets = segments.resets(known)[:, 1:]
    runs = cache.run[:, None] + jnp.cumsum(resets, axis=1, dtype=jnp.int32)
    token_runs = jnp.where(ids != 0, runs, -1)
    attend, put = self._attend_ring, self._put
    if length > 1:
      attend, put = self._attend_unrolled, self._put_many
    o = attend(q, k, v, runs, token_runs, cache)
    ring = put((k, v, token_runs), cache)
    last = segments.last_id(ids, cache.segment_id)
    return o, AttentionCache(*ring, runs[:, -1], last, cache.position + length)

  def _put(self, token, cache):
    """Writes one token over the oldest of the ring."""
    slot = cache.position % self.cache_length
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(ring, x, slot, axis=1)
      for ring, x in zip(cache[:3], token, strict=True)
    )

  def _attend_ring(self, q, k, v, runs, token_runs, cache):
    """Attends to a ring that holds the token itself; order does not matter."""
    k, v, known = self._put((k, v, token_runs), cache)
    return self._masked(q, k, v, runs[..., None] == known[:, None])

  def _in_order(self, cache):
    """Returns k, v, runs of the ring from the oldest token to the newest."""
    oldest = cache.position % self.cache_length
    return tuple(jnp.roll(ring, -oldest, axis=1) for ring in cache[:3])

  def _put_many(self, tokens, cache):
    """Writes several tokens over the oldest of the ring."""
    end = (cache.position + tokens[0].shape[1]) % self.cache_length
    return tuple(
      jnp.roll(
        jnp.concatenate([ring, x], axis=1)[:, -self.cache_length :],
        end,
        axis=1,
      )
      for ring, x in zip(self._in_order(cache), tokens, strict=True)
    )

  def _attend_unrolled(self, q, k, v, runs, token_runs, cache):
    """Attends to the ring followed by this call's tokens."""
    k, v, known = (
      jnp.concatenate([ring, x], axis=1)
      for ring, x in zip(self._in_order(cache), (k, v, token_runs), strict=True)
    )
    length = q.shape[1]
    query = jnp.arange(length)[:, None] + self.cache_length
    key = jnp.arange(self.cache_length + length)[None]
    seen = (key <= query) & (key > query - self.cache_length)
    return self._masked(
      q, k, v, seen[None] & (runs[..., None] == known[:, None])
    )

  def _masked(self, q, k, v, mask):
    return jax.nn.dot_product_attention(
      q, k, v, mask=mask[:, None], implementation='xla'
    )


class SlidingWindow(Attention):
  """Attention over the last `window` tokens; its cache is their ring."""

  config_class = SlidingWindowConfig

  @property
  def window(self) -> int:
    """Tokens a query sees, its own included."""
    return self.config.window

  @property
  def cache_length(self) -> int:
    """Tokens the cache holds."""
    return self.config.window
