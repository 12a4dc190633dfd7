"""Attention against its equation in float64, and its ring beyond its length."""

from flax import nnx
import jax
import numpy as np
import pytest

from deltanet_jax.layers import attention

WIDTH, HEADS, LENGTH = 12, 2, 9
X = np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
IDS = np.array([[1, 1, 1, 2, 2, 1, 1, 1, 1], [3] * 8 + [0]], np.int32)


def _layer(window=None, **fields):
  config_class = attention.AttentionConfig
  layer_class = attention.Attention
  if window:
    config_class = attention.SlidingWindowConfig
    layer_class = attention.SlidingWindow
    fields['window'] = window
  config = config_class(**fields)
  layer = layer_class(WIDTH, HEADS, config=config, rngs=nnx.Rngs(0))
  params = jax.tree.map(
    lambda leaf: 20 * leaf, nnx.to_pure_dict(nnx.state(layer, nnx.Param))
  )
  nnx.update(layer, params)
  return layer, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def _heads(x, kernel, base):
  """Projects x [T, D] into rotated heads [T, H, K]; base 0: not rotated."""
  y = (x @ kernel).reshape(len(x), -1, WIDTH // HEADS)
  if not base:
    return y
  half = y.shape[-1] // 2
  angles = np.arange(len(x))[:, None] * base ** -(np.arange(half) / half)
  z = (y[..., :half] + 1j * y[..., half:]) * np.exp(1j * angles)[:, None]
  return np.concatenate([z.real, z.imag], axis=-1)


def _expected(params, x, *, base=10_000.0, window=LENGTH):
  q, k = (_heads(x, params[f'{n}_proj']['kernel'], base) for n in 'qk')
  v = _heads(x, params['v_proj']['kernel'], 0)
  k, v = (np.repeat(y, HEADS // y.shape[1], axis=1) for y in (k, v))
  logits = np.einsum('thk,shk->hts', q, k) / np.sqrt(q.shape[-1])
  lag = np.arange(len(x))[:, None] - np.arange(len(x))[None]
  logits = np.where((lag >= 0) & (lag < window), logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  o = np.einsum('hts,shk->thk', weights, v)
  return o.reshape(len(x), -1) @ params['o_proj']['kernel']


@pytest.mark.parametrize(
  ('fields', 'given'),
  [
    ({}, {}),
    ({'num_kv_heads': 1}, {}),
    ({'rope_base': 0.0}, {'base': 0}),
    ({'rope_base': 50.0}, {'base': 50.0}),
    ({'window': 3}, {'window': 3}),
    ({'window': 1}, {'window': 1}),
  ],
)
def test_equals_the_equation(fields, given):
  layer, params = _layer(**fields)
  y, _ = layer(X)
  expected = np.stack([_expected(params, x, **given) for x in X])
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('lengths', [(1,) * LENGTH, (4, 5), (2, 1, 5, 1)])
def test_a_full_ring_forgets_the_oldest(lengths):
  """With a ring of 3 tokens, `attention` is what `sliding_window` is."""
  ring, _ = _layer(cache_length=3)
  window, _ = _layer(window=3)
  expected, _ = window(X, segment_ids=IDS)
  cache, start, pieces = ring.init_cache(2), 0, []
  for length in lengths:
    piece = slice(start, start + length)
    y, cache = ring(X[:, piece], segment_ids=IDS[:, piece], cache=cache)
    pieces.append(y)
    start += length
  np.testing.assert_allclose(np.concatenate(pieces, 1), expected, atol=1e-5)


def test_the_flash_kernel_runs_where_it_can(monkeypatch):
  config = attention.AttentionConfig()
  layer = attention.Attention(
    16, 2, config=config, dtype='bfloat16', rngs=nnx.Rngs(0)
  )
  assert layer._implementation(8) == 'xla'
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert layer._implementation(8) == 'cudnn'
  assert layer._implementation(7) == 'xla'
  assert _layer()[0]._implementation(8) == 'xla'  # float32
  forced, _ = _layer(implementation='cudnn')
  assert forced._implementation(7) == 'cudnn'


def test_own_heads_replace_the_model_s():
  layer, _ = _layer(num_heads=6, rope_base=0.0)
  assert (layer.num_heads, layer.head_dim) == (6, 2)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'window': 0}, 'window must be at least 1, got 0'),
    ({'num_heads': -1}, 'num_heads must be at least 0, got -1'),
    ({'cache_length': 0}, 'cache_length must be at least 1, got 0'),
    ({'implementation': 'flash'}, 'implementation must be one of '),
  ],
)
def test_options_are_checked(fields, message):
  window = 'window' in fields
  config = (
    attention.SlidingWindowConfig if window else attention.AttentionConfig
  )
  with pytest.raises(ValueError, match=message):
    config(**fields)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'num_kv_heads': 3}, 'multiple of num_kv_heads, got 2 and 3'),
    ({'num_heads': 5}, 'model_width=12 and num_heads=5'),
    ({'num_heads': 4}, 'even head_dim, got 3'),
  ],
)
def test_heads_are_checked(fields, message):
  with pytest.raises(ValueError, match=message):
    _layer(**fields)
