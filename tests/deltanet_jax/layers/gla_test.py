"""Gated linear attention against its equations (arXiv 2312.06635, 4.4)."""

import numpy as np
import pytest

from deltanet_jax.layers import gla
from tests import layer_testing as lt


def _expected(p, x, layer):
  q, k, v = (lt.linear(p[f'{n}_proj'], x) for n in 'qkv')
  if layer.config.use_short_conv:
    q, k, v = (
      lt.silu(lt.conv(p[f'{n}_conv'], y))
      for n, y in zip('qkv', (q, k, v), strict=True)
    )
  q, k, v = (lt.heads(y) for y in (q, k, v))
  raw = lt.linear(p['decay_proj']['up'], lt.linear(p['decay_proj']['down'], x))
  alpha = lt.heads(lt.sigmoid(raw) ** (1 / layer.config.gate_temperature))

  def update(state, t, h):
    return np.diag(alpha[t, h]) @ state + np.outer(k[t, h], v[t, h])

  key_dim = q.shape[-1]
  o = lt.recurrence(update, q / np.sqrt(key_dim), (key_dim, v.shape[-1]))
  o = lt.rms_norm(p['head_norm'], o).reshape(len(x), -1)
  return lt.linear(p['o_proj'], o * lt.silu(lt.linear(p['gate_proj'], x)))


@pytest.mark.parametrize(
  'options',
  [{}, {'use_short_conv': True, 'key_expansion': 1.0, 'gate_temperature': 2.0}],
)
def test_equals_the_equations(options):
  lt.assert_equals(gla.GLA, _expected, options)


def test_options_are_checked():
  with pytest.raises(ValueError, match='gate_temperature must be above 0'):
    gla.GLAConfig(gate_temperature=0.0)
  with pytest.raises(ValueError, match='head_dim=6 and key_expansion=0.25'):
    lt.build(gla.GLA, {'key_expansion': 0.25})
