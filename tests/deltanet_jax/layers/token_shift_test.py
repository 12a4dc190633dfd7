"""The shift by one token, within documents."""

import numpy as np

from deltanet_jax.layers import token_shift

X = np.arange(1, 13, dtype=np.float32).reshape(1, 6, 2)


def test_shifts_within_documents():
  layer = token_shift.TokenShift(2)
  ids = np.array([[1, 1, 2, 0, 2, 2]], np.int32)
  y, _ = layer(X, segment_ids=ids)
  np.testing.assert_array_equal(y[0, :, 0], [0, 1, 0, 0, 0, 9])


def test_without_ids_the_row_goes_on():
  layer = token_shift.TokenShift(2)
  first, cache = layer(X[:, :4], cache=layer.init_cache(1))
  second, _ = layer(X[:, 4:], cache=cache)
  np.testing.assert_array_equal(first[0, :, 0], [0, 1, 3, 5])
  np.testing.assert_array_equal(second[0, :, 0], [7, 9])
