"""Linear attention against its equations (arXiv 2006.16236, section 3.3)."""

import numpy as np
import pytest

from deltanet_jax.layers import linear_attention
from tests import layer_testing as lt

MAPS = {
  'elu_plus_one': lambda x: np.where(x > 0, x + 1, np.exp(x)),
  'relu': lambda x: np.maximum(x, 0),
  'identity': lambda x: x,
}


def _expected(p, x, layer):
  phi = MAPS[layer.config.feature_map]
  q, k, v = (lt.heads(lt.linear(p[f'{n}_proj'], x)) for n in 'qkv')
  q, k = phi(q), phi(k)
  weights = np.tril(np.einsum('thk,shk->hts', q, k))
  if layer.config.use_normalizer:
    weights = weights / (weights.sum(-1, keepdims=True) + 1e-6)
  else:
    weights = weights / np.sqrt(q.shape[-1])
  o = np.einsum('hts,shv->thv', weights, v)
  if layer.config.use_output_norm:
    o = lt.rms_norm(p['head_norm'], o)
  return lt.linear(p['o_proj'], o.reshape(len(x), -1))


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'feature_map': 'relu', 'use_output_norm': True},
    {'feature_map': 'identity', 'use_normalizer': False},
  ],
)
def test_equals_the_equations(options):
  lt.assert_equals(linear_attention.LinearAttention, _expected, options)


def test_a_normaliser_needs_positive_features():
  with pytest.raises(ValueError, match="never negative, .* got 'identity'"):
    linear_attention.LinearAttentionConfig(feature_map='identity')
