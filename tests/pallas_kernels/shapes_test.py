import re

import numpy as np
import pytest

from pallas_kernels import shapes


def test_sizes_are_returned_by_axis():
  sizes = shapes.check_shapes(
    q=(np.zeros((2, 3, 4)), 'B T H'), beta=(np.zeros((2, 3)), 'B T')
  )
  assert sizes == {'B': 2, 'T': 3, 'H': 4}


def test_another_number_of_axes_is_refused():
  message = 'v must have the 3 axes [B, T, V], got shape (2, 3)'
  with pytest.raises(ValueError, match=re.escape(message)):
    shapes.check_shapes(v=(np.zeros((2, 3)), 'B T V'))


def test_another_size_is_refused_and_says_where_it_came_from():
  message = 'axis T of k must be 3 as in q, got 4 (shape (2, 4), axes [B, T])'
  with pytest.raises(ValueError, match=re.escape(message)):
    shapes.check_shapes(
      q=(np.zeros((2, 3)), 'B T'), k=(np.zeros((2, 4)), 'B T')
    )


def test_an_axis_named_twice_in_one_array_must_agree():
  with pytest.raises(ValueError, match='axis C of a must be 2 as in a, got 3'):
    shapes.check_shapes(a=(np.zeros((2, 3)), 'C C'))
