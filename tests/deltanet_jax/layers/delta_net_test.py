"""The DeltaNet layer against its equations in float64, option by option."""

import functools

from flax import nnx
import jax
import numpy as np
import pytest

from deltanet_jax.layers import delta_net

WIDTH, HEADS, EPS = 12, 2, 0.05
X = np.random.default_rng(0).normal(size=(2, 7, WIDTH)).astype(np.float32)
OPTIONS = {
  'paper': {},
  'no_conv': {'use_short_conv': False},
  'conv_width': {'conv_width': 2},
  'relu': {'feature_map': 'relu'},
  'elu_plus_one': {'feature_map': 'elu_plus_one'},
  'identity': {'feature_map': 'identity'},
  'l1': {'qk_norm': 'l1', 'feature_map': 'elu_plus_one'},
  'negative': {'allow_negative_eigenvalues': True},
  'gate': {'use_output_gate': True},
  'no_conv_relu': {'use_short_conv': False, 'feature_map': 'relu'},
}


def _layer(options, head_dim=0, implementation='recurrent'):
  """Builds a layer whose parameters are large enough to matter."""
  layer = delta_net.DeltaNet(
    WIDTH,
    HEADS,
    head_dim=head_dim,
    config=delta_net.DeltaNetConfig(implementation=implementation, **options),
    norm_eps=EPS,
    rngs=nnx.Rngs(0),
  )
  random = np.random.default_rng(1)
  params = jax.tree.map(
    lambda leaf: leaf + 0.5 * random.normal(size=leaf.shape).astype('float32'),
    nnx.to_pure_dict(nnx.state(layer, nnx.Param)),
  )
  nnx.update(layer, params)
  return layer, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@functools.partial(jax.jit, static_argnums=0)
def _run_pure(graph, params, x, segment_ids, cache):
  layer = nnx.merge(graph, params)
  return layer(x, segment_ids=segment_ids, cache=cache)


def _run(layer, x, segment_ids=None, cache=None):
  return _run_pure(*nnx.split(layer), x, segment_ids, cache)


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _silu(x):
  return x * _sigmoid(x)


MAPS = {
  'silu': _silu,
  'relu': lambda x: np.maximum(x, 0),
  'elu_plus_one': lambda x: np.where(x > 0, x + 1, np.exp(x)),
  'identity': lambda x: x,
}


def _stream(params, config, name, x):
  """Projection and convolution of one of q, k, v for x [T, D]."""
  y = x @ params[f'{name}_proj']['kernel']
  if not config.use_short_conv:
    return y.reshape(len(x), HEADS, -1)
  kernel = params[f'{name}_conv']['kernel']
  padded = np.concatenate([np.zeros((len(kernel) - 1, y.shape[1])), y])
  taps = [kernel[j] * padded[j : j + len(y)] for j in range(len(kernel))]
  return np.sum(taps, axis=0).reshape(len(x), HEADS, -1)


def _normalize(config, x):
  if config.qk_norm == 'l1':
    return x / (np.abs(x).sum(-1, keepdims=True) + 1e-6)
  return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def _expected(params, config, x):
  """Computes the layer for one row x [T, D], token by token."""
  phi = MAPS[config.feature_map]
  q = _normalize(config, phi(_stream(params, config, 'q', x)))
  k = _normalize(config, phi(_stream(params, config, 'k', x)))
  v = _silu(_stream(params, config, 'v', x))
  beta = _sigmoid(x @ params['beta_proj']['kernel'])
  beta = 2 * beta if config.allow_negative_eigenvalues else beta
  o = np.zeros_like(v)
  for h in range(HEADS):
    state = np.zeros((v.shape[-1], k.shape[-1]))  # [V, K], as in the paper
    for t in range(len(x)):
      old = state @ k[t, h]
      state = state - beta[t, h] * np.outer(old - v[t, h], k[t, h])
      o[t, h] = state @ q[t, h]
  o = o / np.sqrt(np.mean(o**2, -1, keepdims=True) + EPS)
  o = (o * params['head_norm']['scale']).reshape(len(x), -1)
  if config.use_output_gate:
    o = o * _silu(x @ params['gate_proj']['kernel'])
  return o @ params['o_proj']['kernel']


@pytest.mark.parametrize(
  ('name', 'head_dim'), [*((name, 0) for name in OPTIONS), ('paper', 5)]
)
def test_equals_the_equations(name, head_dim):
  layer, params = _layer(OPTIONS[name], head_dim)
  y, _ = _run(layer, X)
  expected = np.stack([_expected(params, layer.config, x) for x in X])
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', [name for name in OPTIONS if name != 'paper'])
def test_every_option_changes_the_output(name):
  y, _ = _run(_layer(OPTIONS[name])[0], X)
  paper, _ = _run(_layer({})[0], X)
  assert np.max(np.abs(y - paper)) > 1e-2


@pytest.mark.parametrize('name', ['no_conv', 'conv_width', 'negative', 'gate'])
def test_options_keep_the_cache_contract(name):
  layer, _ = _layer(OPTIONS[name])
  ids = np.array([[1] * 3 + [2] * 4, [0, 3, 3, 0, 3, 3, 0]], np.int32)
  whole, whole_cache = _run(layer, X, ids, layer.init_cache(2))
  cache, pieces = layer.init_cache(2), []
  for start, stop in ((0, 3), (3, 4), (4, 6), (6, 7)):
    piece = slice(start, stop)
    y, cache = _run(layer, X[:, piece], ids[:, piece], cache)
    pieces.append(y)
  np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5)
  np.testing.assert_allclose(cache.state, whole_cache.state, atol=1e-5)
  np.testing.assert_array_equal(cache.segment_id, [2, 3])


def test_chunk_size_and_implementation_reach_the_op():
  recurrent, _ = _run(_layer({})[0], X)
  chunked, _ = _run(_layer({'chunk_size': 4}, implementation='xla')[0], X)
  np.testing.assert_allclose(chunked, recurrent, atol=1e-5)
  with pytest.raises(ValueError, match='nothing_known'):
    _layer({}, implementation='nothing_known')[0](X)


def test_stand_alone_use():
  layer = delta_net.DeltaNet(32, 4, rngs=nnx.Rngs(0))
  y, cache = layer(np.ones((1, 3, 32), np.float32))
  assert y.shape == (1, 3, 32)
  assert cache is None
  assert layer.head_dim == 8


def test_refuses_heads_that_do_not_divide_the_width():
  with pytest.raises(ValueError, match='model_width=10 and num_heads=4'):
    delta_net.DeltaNet(10, 4, rngs=nnx.Rngs(0))
