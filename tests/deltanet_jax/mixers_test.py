"""Every registered mixer keeps the contract of `deltanet_jax.mixers`."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import config as config_lib
from deltanet_jax import mixers

BATCH, LENGTH, WIDTH = 2, 12, 16
TOLERANCE = {'rtol': 1e-5, 'atol': 1e-5}
# An id that comes back, runs of one, padding at the start and at the end.
SEGMENT_IDS = np.array(
  [
    [1, 1, 1, 2, 2, 1, 1, 1, 1, 3, 0, 0],
    [0, 0, 7, 7, 7, 7, 7, 9, 4, 4, 4, 4],
  ],
  np.int32,
)
SPLITS = {
  'second_piece_is_padding': (10, 2),
  'around_one_token': (1, 10, 1),
  'tokens': (1,) * LENGTH,
}


@functools.cache
def _mixer(name, dtype='float32'):
  """Returns a jitted pure function and parameters of a visible size."""
  config = config_lib.ModelConfig(
    model_width=WIDTH, num_heads=2, num_layers=1, dtype=dtype
  )
  mixer = mixers.build_mixer(name, config, nnx.Rngs(0))
  graph, params = nnx.split(mixer)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  params = tree.unflatten(
    leaf + 0.3 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys, strict=True)
  )

  @jax.jit
  def run(params, x, segment_ids=None, cache=None):
    module = nnx.merge(graph, params)
    return module(x, segment_ids=segment_ids, cache=cache)

  return run, params, mixer


def _inputs():
  return jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))


def _in_pieces(name, x, lengths, segment_ids):
  """Runs the pieces of x with the cache carried on; returns y and the cache."""
  run, params, mixer = _mixer(name)
  cache, start, outputs = mixer.init_cache(x.shape[0]), 0, []
  for length in lengths:
    piece = slice(start, start + length)
    ids = None if segment_ids is None else segment_ids[:, piece]
    y, cache = run(params, x[:, piece], ids, cache)
    outputs.append(y)
    start += length
  return jnp.concatenate(outputs, axis=1), cache


@pytest.fixture(params=sorted(mixers.MIXERS))
def name(request):
  return request.param


def test_unknown_name_lists_the_known_ones():
  config = config_lib.ModelConfig()
  with pytest.raises(ValueError, match="one of .*delta_net.* got 'mamba'"):
    mixers.build_mixer('mamba', config, nnx.Rngs(0))


def test_future_does_not_change_the_past(name):
  run, params, _ = _mixer(name)
  x = _inputs()
  y, _ = run(params, x)
  changed, _ = run(params, x.at[:, 7:].add(1.0))
  np.testing.assert_array_equal(y[:, :7], changed[:, :7])
  assert np.all(np.any(y[:, 7:] != changed[:, 7:], axis=-1))


def test_past_reaches_the_end(name):
  run, params, _ = _mixer(name)
  x = _inputs()
  y, _ = run(params, x)
  changed, _ = run(params, x.at[:, 0].add(1.0))
  assert np.max(np.abs(y[:, -1] - changed[:, -1])) > 1e-4


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('packed', [False, True])
def test_whole_equals_pieces(name, split, packed):
  run, params, mixer = _mixer(name)
  x, ids = _inputs(), SEGMENT_IDS if packed else None
  y, cache = run(params, x, ids, mixer.init_cache(BATCH))
  np.testing.assert_allclose(y, run(params, x, ids)[0], **TOLERANCE)
  pieces, pieces_cache = _in_pieces(name, x, SPLITS[split], ids)
  np.testing.assert_allclose(pieces, y, **TOLERANCE)
  for whole, piece in zip(
    jax.tree.leaves(cache), jax.tree.leaves(pieces_cache), strict=True
  ):
    np.testing.assert_allclose(piece, whole, **TOLERANCE)


def test_cache_has_a_constant_size(name):
  run, params, mixer = _mixer(name)
  empty = mixer.init_cache(BATCH)
  _, cache = run(params, _inputs(), None, empty)
  describe = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype))
  assert describe(cache) == describe(empty)


def test_no_cache_in_no_cache_out(name):
  run, params, _ = _mixer(name)
  assert run(params, _inputs())[1] is None


def test_segments_equal_separate_runs(name):
  run, params, _ = _mixer(name)
  x = _inputs()
  y, _ = run(params, x, SEGMENT_IDS)
  for row, ids in enumerate(SEGMENT_IDS):
    bounds = [0, *(np.flatnonzero(np.diff(ids)) + 1), LENGTH]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
      piece = slice(start, stop)
      alone, _ = run(params, x[row : row + 1, piece])
      expected = alone[0] if ids[start] else np.zeros_like(alone[0])
      np.testing.assert_allclose(y[row, piece], expected, **TOLERANCE)


@pytest.mark.parametrize('length', [1, 2])
def test_other_document_forgets_the_cache(name, length):
  run, params, _ = _mixer(name)
  x = _inputs()
  ids = np.full((BATCH, LENGTH), 1, np.int32)
  _, cache = _in_pieces(name, x, (LENGTH,), ids)
  fresh, _ = run(params, x[:, :length])
  other = np.full((BATCH, length), 2, np.int32)
  y, _ = run(params, x[:, :length], other, cache)
  np.testing.assert_allclose(y, fresh, **TOLERANCE)
  same, _ = run(params, x[:, :length], other - 1, cache)
  carried_on, _ = run(params, x[:, :length], None, cache)
  np.testing.assert_allclose(same, carried_on, **TOLERANCE)
  assert np.max(np.abs(same - fresh)) > 1e-3


@pytest.mark.parametrize('length', [1, 2])
def test_padding_touches_no_state(name, length):
  run, params, _ = _mixer(name)
  x = _inputs()
  _, cache = _in_pieces(name, x, (LENGTH,), None)
  zeros = np.zeros((BATCH, length), np.int32)
  y, after = run(params, x[:, :length], zeros, cache)
  np.testing.assert_array_equal(y, np.zeros_like(y))
  if hasattr(cache, 'state'):
    np.testing.assert_array_equal(after.state, cache.state)


def test_gradients_are_finite_and_reach_every_parameter(name):
  run, params, _ = _mixer(name)
  x = _inputs()
  weights = jax.random.normal(jax.random.key(3), x.shape)

  def loss(params, x):
    return jnp.sum(weights * run(params, x, SEGMENT_IDS)[0])

  gradients = jax.grad(loss, argnums=(0, 1))(params, x)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.all(np.isfinite(leaf)), path
    assert np.any(leaf != 0), path


def test_bfloat16_is_close(name):
  run, params, _ = _mixer(name)
  run_bfloat16, _, _ = _mixer(name, 'bfloat16')
  x = _inputs()
  y, _ = run(params, x)
  low, _ = run_bfloat16(params, x.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16
  error = np.linalg.norm(low.astype(jnp.float32) - y) / np.linalg.norm(y)
  assert error < 0.03
