"""H3 against its filter (arXiv 2212.14052, section 3; 2206.11893, eq. 9)."""

import numpy as np
import pytest

from deltanet_jax.layers import h3
from tests import layer_testing as lt


def _kernel(p, length):
  """Returns the S4D filter [length, H] of the zero-order hold."""
  rate = -np.exp(p['log_rate']) + 1j * p['frequency']
  dt = np.exp(p['log_dt'])[:, None]
  c = p['c'][..., 0] + 1j * p['c'][..., 1]
  write = (np.exp(dt * rate) - 1) / rate
  t = np.arange(length)[:, None, None]
  return 2 * (c * write * np.exp(t * dt * rate)).sum(-1).real


def _expected(p, x, layer):
  heads = lt.WIDTH // layer.config.head_width
  q, k, v = (lt.linear(p[f'{n}_proj'], x) for n in 'qkv')
  q, k, v = (lt.heads(y, heads) for y in (q, lt.conv(p['k_conv'], k), v))
  products = np.einsum('thk,thv->thkv', k, v)
  kernel = _kernel(p, len(x))[..., None, None]
  y = p['skip'][:, None, None] * products
  for t in range(len(x)):
    for s in range(t + 1):
      y[t] += kernel[t - s] * products[s]
  o = np.einsum('thk,thkv->thv', q, y)
  return lt.linear(p['o_proj'], o.reshape(len(x), -1))


@pytest.mark.parametrize(
  'options',
  [
    {'state_size': 3, 'shift_width': 4},
    {'state_size': 2, 'shift_width': 2, 'head_width': 3, 'chunk_size': 4},
  ],
)
def test_equals_the_equations(options):
  lt.assert_equals(h3.H3, _expected, options)


def test_options_are_checked():
  with pytest.raises(ValueError, match='shift_width must be at least 1, got 0'):
    h3.H3Config(shift_width=0)
  with pytest.raises(ValueError, match='multiple of head_width, got 12 and 5'):
    lt.build(h3.H3, {'head_width': 5})
