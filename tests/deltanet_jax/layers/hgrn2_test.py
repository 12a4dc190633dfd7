"""HGRN2 against its equations (arXiv 2404.07904, section 3.3)."""

import numpy as np
import pytest

from deltanet_jax.layers import hgrn2
from tests import layer_testing as lt


def _expected(p, x, layer):
  streams = {n: lt.linear(p[f'{n}_proj'], x) for n in 'qfv'}
  if layer.config.use_short_conv:
    streams = {n: lt.conv(p[f'{n}_conv'], y) for n, y in streams.items()}
  bound = lt.sigmoid(p['bound']) if layer.config.use_lower_bound else 0
  alpha = lt.heads(bound + (1 - bound) * lt.sigmoid(streams['f']))
  q, v = lt.heads(lt.silu(streams['q'])), lt.heads(streams['v'])

  def update(state, t, h):
    return np.diag(alpha[t, h]) @ state + np.outer(1 - alpha[t, h], v[t, h])

  o = lt.recurrence(update, q / np.sqrt(6), (6, 6)).reshape(len(x), -1)
  return lt.linear(p['o_proj'], lt.rms_norm(p['norm'], o))


@pytest.mark.parametrize(
  'options', [{}, {'use_short_conv': True, 'use_lower_bound': False}]
)
def test_equals_the_equations(options):
  lt.assert_equals(hgrn2.HGRN2, _expected, options)


def test_options_are_checked():
  with pytest.raises(ValueError, match='conv_width must be at least 1, got 0'):
    hgrn2.HGRN2Config(conv_width=0)
