"""The fast-weight delta rule against its equations (arXiv 2102.11174, 4-5)."""

import numpy as np
import pytest

from deltanet_jax.layers import schlag
from tests import layer_testing as lt


def _dpfp(x, nu):
  """Equation 37 of the paper, feature by feature."""
  r = np.maximum(np.concatenate([x, -x], axis=-1), 0)
  size = r.shape[-1]
  features = np.zeros((*r.shape[:-1], size * nu))
  for j in range(nu):
    for i in range(size):
      features[..., j * size + i] = r[..., i] * r[..., (i - j - 1) % size]
  return features


def _expected(p, x, layer):
  def features(y):
    if layer.config.feature_map == 'dpfp':
      y = _dpfp(y, layer.config.nu)
    else:
      y = np.where(y > 0, y + 1, np.exp(y))
    return y / (y.sum(-1, keepdims=True) + 1e-6)

  q, k, v = (lt.heads(lt.linear(p[f'{n}_proj'], x)) for n in 'qkv')
  q, k = features(q), features(k)
  beta = lt.sigmoid(lt.linear(p['beta_proj'], x))

  def update(state, t, h):
    old = state.T @ k[t, h]
    return state + beta[t, h] * np.outer(k[t, h], v[t, h] - old)

  o = lt.recurrence(update, q, (q.shape[-1], 6)).reshape(len(x), -1)
  return lt.linear(p['o_proj'], o)


@pytest.mark.parametrize(
  'options', [{}, {'nu': 3}, {'feature_map': 'elu_plus_one'}]
)
def test_equals_the_equations(options):
  lt.assert_equals(schlag.Schlag, _expected, options)


def test_options_are_checked():
  with pytest.raises(ValueError, match="one of dpfp, elu_plus_one, got 'relu'"):
    schlag.SchlagConfig(feature_map='relu')
