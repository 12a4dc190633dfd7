"""What `Past` tells a mixer, in the cases the mixers' own tests leave out."""

from flax import nnx
import numpy as np

from deltanet_jax.layers import delta_net
from deltanet_jax.layers import recurrence

X = np.zeros((2, 4, 8), np.float32)


def _past(segment_ids, cached_ids=None):
  layer = delta_net.DeltaNet(8, 2, rngs=nnx.Rngs(0))
  cache = None
  if cached_ids is not None:
    cache = layer.init_cache(2)
    cache = cache._replace(
      state=cache.state + 1, segment_id=np.array(cached_ids, np.int32)
    )
  return recurrence.Past(layer, X, segment_ids, cache)


def test_without_ids_nothing_is_padding_and_nothing_resets():
  past = _past(None)
  assert past.ids is None and past.tokens is None and past.resets is None
  assert past.cache() is None


def test_resets_skip_padding():
  ids = np.array([[0, 1, 0, 1], [2, 0, 3, 3]], np.int32)
  past = _past(ids)
  np.testing.assert_array_equal(past.tokens, ids != 0)
  np.testing.assert_array_equal(np.argwhere(past.resets), [[1, 2]])


def test_state_is_emptied_where_another_document_begins():
  ids = np.array([[0, 0, 0, 0], [0, 5, 5, 5]], np.int32)
  past = _past(ids, cached_ids=[4, 4])
  np.testing.assert_array_equal(past.state[:, 0, 0, 0], [1, 0])
  np.testing.assert_array_equal(past.cache().segment_id, [4, 5])


def test_select_rows_takes_trees():
  rows = np.array([True, False])
  chosen = recurrence.select_rows(
    rows, {'a': np.ones((2, 3))}, {'a': np.zeros((2, 3))}
  )
  np.testing.assert_array_equal(chosen['a'], [[1] * 3, [0] * 3])
