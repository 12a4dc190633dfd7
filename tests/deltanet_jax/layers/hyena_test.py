"""Hyena against its equations (arXiv 2302.10866, definition 3.1)."""

import numpy as np
import pytest

from deltanet_jax.layers import hyena
from tests import layer_testing as lt

SIZES = {'filter_length': 5, 'filter_width': 4, 'num_bands': 2}


def _filter(p, config, channels):
  """Appendix D.3: an implicit filter, windowed."""
  length = config.filter_length
  t = np.linspace(0, 1, length)[:, None]
  bands = np.linspace(1e-4, config.num_bands - 1, config.num_bands)
  angles = 2 * np.pi * np.arange(length)[:, None] / length * bands
  z = np.concatenate([t, np.cos(angles), -np.sin(angles)], axis=1)
  for i in range(1 + config.filter_layers):
    z = np.sin(p['frequency'] * (z @ p[f'kernel_{i}'] + p[f'bias_{i}']))
  decay = np.log(0.01) * np.linspace(1 / 1.5, 1 / 0.3, channels)
  return np.exp(decay * t) * (z @ p['output'])


def _convolve(h, x):
  """Sums h[s] x[t - s] over the filter, x [T, ...], h [L, ...]."""
  y = np.zeros_like(x)
  for t in range(len(x)):
    for s in range(min(t + 1, len(h))):
      y[t] += h[s] * x[t - s]
  return y


def _hyena(p, x, layer):
  streams = lt.conv(p['short_conv'], lt.linear(p['in_proj'], x))
  *gates, v = np.split(streams, layer.config.order + 1, axis=-1)
  for i in reversed(range(1, layer.config.order)):
    conv = p[f'long_conv_{i}']
    h = _filter(conv['filter'], layer.config, lt.WIDTH)
    gated = gates[i] * v
    v = _convolve(h, gated) + conv['skip'] * gated
  return lt.linear(p['o_proj'], gates[0] * v)


def _multihead(p, x, layer):
  heads = lt.WIDTH // layer.config.head_width
  streams = lt.conv(p['short_conv'], lt.linear(p['in_proj'], x))
  q, k, v = (lt.heads(y, heads) for y in np.split(streams, 3, axis=-1))
  conv = p['long_conv']
  h = _filter(conv['filter'], layer.config, heads)
  products = np.einsum('thk,thv->thkv', k, v)
  skip = conv['skip'][:, None, None] * products
  products = _convolve(h[..., None, None], products) + skip
  o = np.einsum('thk,thkv->thv', q, products)
  return lt.linear(p['o_proj'], o.reshape(len(x), -1))


@pytest.mark.parametrize('order', [2, 3])
def test_equals_the_equations(order):
  lt.assert_equals(hyena.Hyena, _hyena, {'order': order, **SIZES})


@pytest.mark.parametrize('width', [1, 4])
def test_multihead_equals_the_equations(width):
  lt.assert_equals(
    hyena.MultiheadHyena, _multihead, {'head_width': width, **SIZES}
  )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'order': 1}, 'order must be at least 2, got 1'),
    ({'filter_length': 1}, 'filter_length must be at least 2, got 1'),
    ({'filter_width': 0}, 'filter_width must be at least 1, got 0'),
  ],
)
def test_options_are_checked(fields, message):
  with pytest.raises(ValueError, match=message):
    hyena.HyenaConfig(**fields)


def test_multihead_options_are_checked():
  with pytest.raises(ValueError, match='must be 2, got 3'):
    hyena.MultiheadHyenaConfig(order=3)
  with pytest.raises(ValueError, match='multiple of head_width, got 12 and 5'):
    lt.build(hyena.MultiheadHyena, {'head_width': 5})
