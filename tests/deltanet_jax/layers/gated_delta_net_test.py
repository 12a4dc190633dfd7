"""Gated DeltaNet against its equations (arXiv 2412.06464, equation 10)."""

import numpy as np
import pytest

from deltanet_jax.layers import gated_delta_net
from tests import layer_testing as lt


def _streams(p, x, layer):
  q, k, v = (lt.linear(p[f'{n}_proj'], x) for n in 'qkv')
  if layer.config.use_short_conv:
    q, k, v = (
      lt.conv(p[f'{n}_conv'], y) for n, y in zip('qkv', (q, k, v), strict=True)
    )
  q, k, v = (lt.heads(lt.silu(y)) for y in (q, k, v))
  beta = lt.sigmoid(lt.linear(p['beta_proj'], x))
  if layer.config.allow_negative_eigenvalues:
    beta = 2 * beta
  return lt.l2(q), lt.l2(k), v, beta


def _expected(p, x, layer):
  q, k, v, beta = _streams(p, x, layer)
  dt = lt.softplus(lt.linear(p['a_proj'], x) + p['dt_bias'])
  alpha = np.exp(-np.exp(p['a_log']) * dt)

  def update(state, t, h):
    key = k[t, h]
    erase = np.eye(len(key)) - beta[t, h] * np.outer(key, key)
    return alpha[t, h] * erase @ state + beta[t, h] * np.outer(key, v[t, h])

  o = lt.recurrence(update, q / np.sqrt(q.shape[-1]), (6, v.shape[-1]))
  o = lt.rms_norm(p['head_norm'], o).reshape(len(x), -1)
  if layer.config.use_output_gate:
    o = o * lt.silu(lt.linear(p['gate_proj'], x))
  return lt.linear(p['o_proj'], o)


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'use_short_conv': False, 'value_expansion': 1},
    {'use_output_gate': False, 'allow_negative_eigenvalues': True},
  ],
)
def test_equals_the_equations(options):
  lt.assert_equals(gated_delta_net.GatedDeltaNet, _expected, options)


def test_options_are_checked():
  with pytest.raises(ValueError, match='value_expansion must be at least 1'):
    gated_delta_net.GatedDeltaNetConfig(value_expansion=0)
