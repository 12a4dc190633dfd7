"""DeltaProduct against its equations (arXiv 2502.10297)."""

import numpy as np
import pytest

from deltanet_jax.layers import delta_product
from tests import layer_testing as lt


def _expected(p, x, layer):
  config, length = layer.config, len(x)
  num = config.num_householder
  q, k, v = (lt.linear(p[f'{n}_proj'], x) for n in 'qkv')
  if config.use_short_conv:
    q, k, v = (
      lt.conv(p[f'{n}_conv'], y) for n, y in zip('qkv', (q, k, v), strict=True)
    )
  q = lt.l2(lt.heads(lt.silu(q)))
  k, v, beta = (
    y.reshape(length, lt.HEADS, num, -1).swapaxes(1, 2)
    for y in (lt.silu(k), lt.silu(v), lt.linear(p['beta_proj'], x))
  )
  k, beta = lt.l2(k), lt.sigmoid(beta)[..., 0]
  beta = beta * (2 if config.allow_negative_eigenvalues else 1)
  alpha = np.ones((length, lt.HEADS))
  if config.use_forget_gate:
    dt = lt.softplus(lt.linear(p['a_proj'], x) + p['dt_bias'])
    alpha = np.exp(-np.exp(p['a_log']) * dt)

  def update(state, t, h):
    state = alpha[t, h] * state
    for j in range(num):
      key, strength = k[t, j, h], beta[t, j, h]
      old = state.T @ key
      state = state + strength * np.outer(key, v[t, j, h] - old)
    return state

  o = lt.recurrence(update, q / np.sqrt(q.shape[-1]), (6, v.shape[-1]))
  o = lt.rms_norm(p['head_norm'], o).reshape(length, -1)
  if config.use_output_gate:
    o = o * lt.silu(lt.linear(p['gate_proj'], x))
  return lt.linear(p['o_proj'], o)


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'num_householder': 3, 'use_forget_gate': True},
    {
      'num_householder': 1,
      'use_short_conv': False,
      'use_output_gate': False,
      'allow_negative_eigenvalues': False,
    },
  ],
)
def test_equals_the_equations(options):
  lt.assert_equals(delta_product.DeltaProduct, _expected, options)


def test_options_are_checked():
  with pytest.raises(ValueError, match='num_householder must be at least 1'):
    delta_product.DeltaProductConfig(num_householder=0)
