"""Kimi Delta Attention against its equations (arXiv 2510.26692)."""

import numpy as np
import pytest

from deltanet_jax.layers import kimi_delta
from tests import layer_testing as lt


def _low_rank(p, x):
  return lt.linear(p['up'], lt.linear(p['down'], x))


def _expected(p, x, layer):
  q, k, v = (lt.linear(p[f'{n}_proj'], x) for n in 'qkv')
  if layer.config.use_short_conv:
    q, k, v = (
      lt.conv(p[f'{n}_conv'], y) for n, y in zip('qkv', (q, k, v), strict=True)
    )
  q, k, v = (lt.heads(lt.silu(y)) for y in (q, k, v))
  q, k = lt.l2(q), lt.l2(k)
  beta = lt.sigmoid(lt.linear(p['beta_proj'], x))
  if layer.config.allow_negative_eigenvalues:
    beta = 2 * beta
  dt = lt.softplus(lt.heads(_low_rank(p['f_proj'], x)) + p['dt_bias'])
  alpha = np.exp(-np.exp(p['a_log'])[:, None] * dt)

  def update(state, t, h):
    key = k[t, h]
    erase = np.eye(len(key)) - beta[t, h] * np.outer(key, key)
    kept = erase @ np.diag(alpha[t, h]) @ state
    return kept + beta[t, h] * np.outer(key, v[t, h])

  o = lt.recurrence(update, q / np.sqrt(q.shape[-1]), (6, 6))
  o = lt.rms_norm(p['head_norm'], o).reshape(len(x), -1)
  return lt.linear(p['o_proj'], o * lt.sigmoid(_low_rank(p['gate_proj'], x)))


@pytest.mark.parametrize(
  'options', [{}, {'use_short_conv': False, 'allow_negative_eigenvalues': True}]
)
def test_equals_the_equations(options):
  lt.assert_equals(kimi_delta.KimiDelta, _expected, options)


def test_options_are_checked():
  with pytest.raises(ValueError, match='conv_width must be at least 1, got 0'):
    kimi_delta.KimiDeltaConfig(conv_width=0)
