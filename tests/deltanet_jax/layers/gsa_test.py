"""Gated slot attention against its equations (arXiv 2409.07146, section 3)."""

import pytest

from deltanet_jax.layers import gsa
from tests import layer_testing as lt
from tests import slots


def _expected(p, x, layer):
  q, k, v = (lt.linear(p[f'{n}_proj'], x) for n in 'qkv')
  if layer.config.use_short_conv:
    q, k, v = (
      lt.silu(lt.conv(p[f'{n}_conv'], y))
      for n, y in zip('qkv', (q, k, v), strict=True)
    )
  q, k, v = (lt.heads(lt.silu(y)) for y in (q, k, v))
  f = lt.sigmoid(lt.linear(p['f_proj'], x))
  alpha = lt.heads(f ** (1 / layer.config.gate_temperature))
  o = slots.attend(q, k, v, 1 - alpha, alpha, scale=1.0)
  o = lt.silu(o).reshape(len(x), -1)
  return lt.linear(p['o_proj'], lt.rms_norm(p['norm'], o))


@pytest.mark.parametrize(
  'options', [{'num_slots': 3}, {'num_slots': 5, 'use_short_conv': True}]
)
def test_equals_the_equations(options):
  lt.assert_equals(gsa.GSA, _expected, options)


def test_options_are_checked():
  with pytest.raises(ValueError, match='num_slots must be at least 1, got 0'):
    gsa.GSAConfig(num_slots=0)
