import numpy as np
import pytest

from experiments import inverse_accuracy


@pytest.mark.parametrize('beta', inverse_accuracy.BETAS)
@pytest.mark.parametrize('cosine', inverse_accuracy.COSINES)
def test_the_inside_in_float64_is_right_to_rounding(cosine, beta):
  errors = inverse_accuracy.errors(inverse_accuracy.lower(cosine, beta, 64))
  assert errors['float64'] < 1e-7
  assert errors['float64'] <= errors['float32'] < 1e-4


def test_keys_have_the_cosine():
  matrix = inverse_accuracy.lower(0.9, 2.0, 32)
  below = matrix[:, *np.tril_indices(32, -1)]
  assert abs(np.mean(below) / 2 - 0.9) < 0.02
  assert not np.any(np.triu(matrix))
