"""The short convolution against a loop, packed and in pieces."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.layers import short_conv

X = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
IDS = np.array(
  [[1, 1, 2, 1, 1, 1, 1, 0, 0], [0, 4, 4, 0, 4, 4, 5, 5, 5]], np.int32
)


def _conv(width):
  return short_conv.ShortConv(3, width=width, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnums=0)
def _run_pure(graph, params, x, segment_ids, cache):
  conv = nnx.merge(graph, params)
  return conv(x, segment_ids=segment_ids, cache=cache)


def _run(conv, x, segment_ids=None, cache=None):
  return _run_pure(*nnx.split(conv), x, segment_ids, cache)


def _expected(kernel, x, ids):
  """Loops back from every token until its document ends."""
  width, y = kernel.shape[0], np.zeros(x.shape)
  for b, t in np.ndindex(x.shape[:2]):
    for back in range(min(width, t + 1)):
      source = t - back
      between = ids[b, source : t + 1]
      if set(between[between != 0]) != {ids[b, t]}:
        break
      if ids[b, t] and ids[b, source]:
        y[b, t] += kernel[width - 1 - back] * x[b, source]
  return y


@pytest.mark.parametrize('width', [1, 2, 4])
@pytest.mark.parametrize('ids', [None, IDS], ids=['one', 'packed'])
def test_equals_a_loop(width, ids):
  conv = _conv(width)
  y, cache = _run(conv, X, ids)
  ones = np.ones(X.shape[:2], np.int32)
  kernel = np.asarray(conv.kernel[...], np.float64)
  expected = _expected(kernel, X, ones if ids is None else ids)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
  assert cache is None


@pytest.mark.parametrize('width', [1, 2, 4, 12])
@pytest.mark.parametrize('ids', [None, IDS], ids=['one', 'packed'])
@pytest.mark.parametrize('start', [0, 2, 5])
def test_gradients_equal_those_of_the_definition(width, ids, start):
  """Of rows that start at `start`, with what is before them in a cache."""
  conv = _conv(width)
  graph, params = nnx.split(conv)
  weights = np.random.default_rng(1).normal(size=X.shape)[:, start:]
  everywhere = np.ones(X.shape[:2], np.int32) if ids is None else ids

  def loss(params, x):
    conv, cache = nnx.merge(graph, params), None
    if start:
      part = None if ids is None else ids[:, :start]
      _, cache = conv(
        x[:, :start], segment_ids=part, cache=conv.init_cache(len(x))
      )
    part = None if ids is None else ids[:, start:]
    y, _ = conv(x[:, start:], segment_ids=part, cache=cache)
    return jnp.sum(weights * y)

  dparams, dx = jax.jit(jax.grad(loss, (0, 1)))(params, X)
  # The convolution is linear in x and in the kernel: its gradients are what it
  # gives for unit vectors.
  kernel = np.asarray(conv.kernel[...], np.float64)

  def value(kernel, x):
    return np.sum(weights * _expected(kernel, x, everywhere)[:, start:])

  for index in np.ndindex(X.shape):
    unit = np.zeros(X.shape)
    unit[index] = 1
    np.testing.assert_allclose(dx[index], value(kernel, unit), atol=1e-5)
  for index in np.ndindex(kernel.shape):
    unit = np.zeros(kernel.shape)
    unit[index] = 1
    np.testing.assert_allclose(
      dparams['kernel'][...][index], value(unit, X), atol=1e-5
    )


@pytest.mark.parametrize('width', [1, 2, 4])
@pytest.mark.parametrize('ids', [None, IDS], ids=['one', 'packed'])
@pytest.mark.parametrize('lengths', [(1, 8), (1,) * 9, (8, 1)])
def test_pieces_equal_the_whole(width, ids, lengths):
  conv = _conv(width)
  whole, _ = _run(conv, X, ids)
  cache, start, pieces = conv.init_cache(2), 0, []
  for length in lengths:
    piece = slice(start, start + length)
    part = None if ids is None else ids[:, piece]
    y, cache = _run(conv, X[:, piece], part, cache)
    pieces.append(y)
    start += length
  np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-6)


def test_document_of_the_cache_goes_on_without_ids():
  conv = _conv(3)
  ids = np.full((2, 9), 6, np.int32)
  _, cache = conv(X[:, :4], segment_ids=ids[:, :4], cache=conv.init_cache(2))
  y, cache = conv(X[:, 4:], cache=cache)
  np.testing.assert_allclose(y, conv(X)[0][:, 4:], atol=1e-6)
  np.testing.assert_array_equal(cache.segment_ids, ids[:, :2])


def test_x_is_saved_once():
  conv = _conv(4)
  graph, params = nnx.split(conv)

  def run(params, x):
    return nnx.merge(graph, params)(x)[0]

  _, pullback = jax.eval_shape(functools.partial(jax.vjp, run), params, X)
  shapes = [x.shape for x in jax.tree.leaves(pullback)]
  assert shapes.count(X.shape) == 1


def test_bfloat16():
  conv = short_conv.ShortConv(3, dtype='bfloat16', rngs=nnx.Rngs(0))
  y, _ = conv(jnp.asarray(X))
  assert y.dtype == jnp.bfloat16


def test_bias_is_added_but_not_at_padding():
  layer = short_conv.ShortConv(3, use_bias=True, rngs=nnx.Rngs(0))
  x = np.zeros((1, 3, 3), np.float32)
  ids = np.array([[1, 1, 0]], np.int32)
  y, _ = layer(x, segment_ids=ids)
  np.testing.assert_array_equal(y[0, 0], layer.bias[...])
  np.testing.assert_array_equal(y[0, 2], 0)
