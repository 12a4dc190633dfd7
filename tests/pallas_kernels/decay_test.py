"""Decays and resets of a chunk against brute force in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decay
from tests import testing

BATCH, KEY_DIM = 2, 3
KINDS = ('zero', 'tiny', 'closed', 'far', 'mixed')


def _decays(rng, kind, shape):
  """Returns log-decays; `far` underflows within two tokens."""
  tiny = -1e-6 * rng.exponential(1, shape)
  kinds = {
    'zero': np.zeros(shape),
    'tiny': tiny,
    'closed': np.full(shape, -20.0),
    'far': np.full(shape, -1e3),
  }
  drawn = np.stack([*kinds.values(), -rng.exponential(1, shape)])
  mixed = np.take_along_axis(drawn, rng.integers(0, 5, shape)[None], 0)[0]
  return kinds.get(kind, mixed)


def _ids(kind, size):
  if kind is None:
    return None
  ids = np.random.default_rng(5).integers(0, 3, (BATCH, size))
  return {'mixed': ids, 'padding': 0 * ids, 'one': 0 * ids + 4}[kind]


def _segment_numbers(ids):
  """Returns, per token, the number of resets so far, token by token."""
  numbers = np.zeros(ids.shape, int)
  for b, row in enumerate(ids):
    number, last = 0, 0
    for t, i in enumerate(row):
      number += i != 0 and last not in (0, i)
      last = i or last
      numbers[b, t] = number
  return numbers


def _cut(ids, chunks=1):
  if ids is None:
    return decay.segments(None, None, chunks)
  resets, _ = decay.count_resets(jnp.asarray(ids, jnp.int32))
  return decay.segments(resets, decay.previous_resets(resets), chunks)


def _covered(g, i, j):
  """Returns the decay from token j to token i, [K]."""
  return np.exp(np.sum(g[j + 1 : i + 1], axis=0))


def _brute_scores(x, y, g, numbers, d, *, strict, stride):
  """Returns the scores of [B, R, K] and the gradients of their sum with d."""
  scores, gradients = np.zeros(d.shape), [np.zeros_like(a) for a in (x, y, g)]
  for b, row, j in np.ndindex(d.shape):
    i = (row + 1) * stride - 1
    if j > i - strict or numbers[b, i] != numbers[b, j]:
      continue
    terms = x[b, row] * y[b, j] * _covered(g[b], i, j)
    scores[b, row, j] = np.sum(terms)
    factor = d[b, row, j] * _covered(g[b], i, j)
    gradients[0][b, row] += factor * y[b, j]
    gradients[1][b, j] += factor * x[b, row]
    gradients[2][b, j + 1 : i + 1] += d[b, row, j] * terms
  return scores, gradients


@functools.cache
def _scores(strict, stride):
  def run(x, y, g, cut, d):
    scores, pullback = jax.vjp(
      lambda *a: decay.scores(*a, cut, strict=strict, stride=stride), x, y, g
    )
    return scores, pullback(d)

  return jax.jit(run)


def _check_scores(size, axes, kind, ids_kind=None, *, strict=False, stride=1):
  rng = np.random.default_rng(0)
  rows = size // stride
  g = _decays(rng, kind, (BATCH, size, KEY_DIM if axes == 'channel' else 1))
  x, y = (rng.standard_normal((BATCH, n, KEY_DIM)) for n in (rows, size))
  d = rng.standard_normal((BATCH, rows, size))
  x, y, g, d = (a.astype(np.float32).astype(np.float64) for a in (x, y, g, d))
  ids = _ids(ids_kind, size)
  numbers = np.zeros((BATCH, size)) if ids is None else _segment_numbers(ids)
  whole_g = np.broadcast_to(g, y.shape)
  expected, gradients = _brute_scores(
    x, y, whole_g, numbers, d, strict=strict, stride=stride
  )
  if axes != 'channel':
    gradients[2] = np.sum(gradients[2], axis=-1, keepdims=True)
  arrays = [jnp.asarray(a[None, :, None], jnp.float32) for a in (x, y, g, d)]
  if axes is None:
    arrays[2], gradients = None, gradients[:2]
  with jax.default_matmul_precision('highest'):
    found = _scores(strict, stride)(*arrays[:3], _cut(ids), arrays[3])
  for actual, wanted in zip(
    jax.tree.leaves(found), (expected, *gradients), strict=True
  ):
    assert testing.error(np.float64(actual)[0, :, 0], wanted) < 1e-6


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('axes', ['head', 'channel'])
def test_scores_of_every_kind_of_decay(axes, kind):
  _check_scores(13, axes, kind)


@pytest.mark.parametrize('size', [1, 2, 7, 16])
@pytest.mark.parametrize('axes', ['head', 'channel'])
def test_scores_of_every_size(axes, size):
  _check_scores(size, axes, 'mixed')


@pytest.mark.parametrize('ids', ['mixed', 'padding', 'one'])
@pytest.mark.parametrize('axes', [None, 'head', 'channel'])
@pytest.mark.parametrize('strict', [False, True])
def test_scores_of_segments(strict, axes, ids):
  axes_kind = 'zero' if axes is None else 'mixed'
  _check_scores(13, axes, axes_kind, ids, strict=strict)


@pytest.mark.parametrize('ids', [None, 'mixed'])
@pytest.mark.parametrize('axes', [None, 'head'])
def test_scores_of_rows_a_stride_apart(axes, ids):
  axes_kind = 'zero' if axes is None else 'mixed'
  _check_scores(12, axes, axes_kind, ids, stride=3)


def _brute_passage(g, numbers, before):
  """Returns entry, exit and keep of a chunk; `before` is its first number."""
  size = len(g)
  entry = [_covered(g, t, -1) * (numbers[t] == before) for t in range(size)]
  exit_ = [
    _covered(g, size - 1, t) * (numbers[t] == numbers[-1]) for t in range(size)
  ]
  keep = _covered(g, size - 1, -1) * (numbers[-1] == before)
  return np.array(entry), np.array(exit_), keep[:, None]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ids_kind', [None, 'mixed', 'padding'])
@pytest.mark.parametrize('width', [None, 1, KEY_DIM])
def test_passage(width, ids_kind, kind):
  chunks, size = 3, 5
  rng = np.random.default_rng(1)
  shape = (chunks, BATCH, 1, size, width or 1)
  g = np.float32(_decays(rng, kind, shape)) * (width is not None)
  ids = _ids(ids_kind, chunks * size)
  numbers = _segment_numbers(np.ones((BATCH, chunks * size), int))
  if ids is not None:
    numbers = _segment_numbers(ids)
  with jax.default_matmul_precision('highest'):
    found = decay.passage(
      None if width is None else jnp.asarray(g), _cut(ids, chunks)
    )
  if width is None and ids is None:
    assert found == (None, None, None)
    return
  cut = np.moveaxis(numbers.reshape(BATCH, chunks, size), 1, 0)
  for m, b in np.ndindex(chunks, BATCH):
    before = cut[m - 1, b, -1] if m else 0
    expected = _brute_passage(np.float64(g[m, b, 0]), cut[m, b], before)
    for actual, wanted in zip(found, expected, strict=True):
      # Below the least normal number of float32 a decay is 0.
      np.testing.assert_allclose(actual[m, b, 0], wanted, rtol=1e-5, atol=2e-38)


def test_resets_are_counted_from_the_last_token_that_is_not_padding():
  ids = [[0, 3, 0, 3, 5, 0, 0, 3], [7, 7, 7, 0, 7, 1, 2, 2]]
  resets, valid = decay.count_resets(jnp.asarray(ids, jnp.int32))
  expected = [[0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 2, 2]]
  np.testing.assert_array_equal(resets, expected)
  np.testing.assert_array_equal(valid, np.array(ids) != 0)
  np.testing.assert_array_equal(
    decay.previous_resets(resets), [[0, *row[:-1]] for row in expected]
  )


def test_no_factor_is_one():
  x = jnp.arange(3.0)
  assert decay.scaled(x, None) is x
  np.testing.assert_array_equal(decay.scaled(x, 2 * x), 2 * x * x)


@pytest.mark.parametrize('axes', ['head', 'channel'])
def test_scores_under_two_vmaps(axes):
  rng = np.random.default_rng(0)
  leading = (2, 2, 2, 1, 3)  # two of vmap, M, B, H
  x, y = (rng.standard_normal((*leading, 8, KEY_DIM)) for _ in range(2))
  g = -rng.exponential(size=(*leading, 8, KEY_DIM if axes == 'channel' else 1))
  arrays = [jnp.asarray(a, jnp.float32) for a in (x, y, g)]
  run = functools.partial(decay.scores, cut=None)
  alone = jax.jit(run)(*arrays)
  np.testing.assert_allclose(
    jax.jit(jax.vmap(jax.vmap(run)))(*arrays), alone, rtol=1e-6, atol=1e-6
  )
