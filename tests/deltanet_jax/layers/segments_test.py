"""Bookkeeping of packed documents on hand-made rows."""

import jax.numpy as jnp
import numpy as np

from deltanet_jax.layers import segments

IDS = jnp.array([[0, 0, 3, 3, 0, 3, 0, 5, 3, 0], [0] * 10], jnp.int32)


def test_forward_fill():
  np.testing.assert_array_equal(
    segments.forward_fill(IDS), [[0, 0, 3, 3, 3, 3, 3, 5, 3, 3], [0] * 10]
  )


def test_runs_are_distinct_and_span_padding():
  np.testing.assert_array_equal(
    segments.run_numbers(IDS), [[0, 0, 1, 1, 1, 1, 1, 2, 3, 3], [0] * 10]
  )


def test_first_and_last_id():
  previous = jnp.array([7, 8], jnp.int32)
  np.testing.assert_array_equal(segments.first_id(IDS), [3, 0])
  np.testing.assert_array_equal(segments.last_id(IDS, previous), [3, 8])
  np.testing.assert_array_equal(segments.last_id(IDS[:, :0], previous), [7, 8])


def test_continued_ids():
  previous = jnp.array([7, 0], jnp.int32)
  np.testing.assert_array_equal(
    segments.continued_ids(previous, 3), [[7, 7, 7], [1, 1, 1]]
  )
