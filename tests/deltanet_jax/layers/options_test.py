"""The checks of options name the rule and the value."""

import pytest

from deltanet_jax.layers import options


def test_head_dim_is_filled_in():
  assert options.resolve_head_dim(12, 3, 0) == 4
  assert options.resolve_head_dim(10, 3, 5) == 5
  with pytest.raises(ValueError, match='model_width=10 and num_heads=3'):
    options.resolve_head_dim(10, 3, 0)


def test_chunk_size_is_checked():
  with pytest.raises(ValueError, match='chunk_size must be at least 0, got -1'):
    options.RecurrenceConfig(chunk_size=-1)
