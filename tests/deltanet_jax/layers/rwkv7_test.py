"""RWKV-7 against its equations (arXiv 2503.14456, section 4)."""

import numpy as np
import pytest

from deltanet_jax.layers import rwkv7
from tests import layer_testing as lt


def _expected(p, x, layer):
  before = lt.shift(x)
  r_in, w_in, k_in, v_in, a_in, g_in = (x + (before - x) * mu for mu in p['mu'])
  r, k, v = (
    lt.heads(lt.linear(p[f'{n}_proj'], y))
    for n, y in (('r', r_in), ('k', k_in), ('v', v_in))
  )
  w = lt.linear(
    p['w_proj']['up'], np.tanh(lt.linear(p['w_proj']['down'], w_in))
  )
  # The paper's exp(-exp(-0.5 - softplus(-w))).
  decay = lt.heads(np.exp(-np.exp(-0.5 - lt.softplus(-w))))
  a = lt.linear(p['a_proj']['up'], lt.linear(p['a_proj']['down'], a_in))
  a = lt.heads(lt.sigmoid(a))
  gate = lt.sigmoid(lt.linear(p['gate_proj']['down'], g_in))
  gate = lt.linear(p['gate_proj']['up'], gate)
  kappa = lt.l2(k * p['k_k'])
  k = k * (1 + (a - 1) * p['k_a'])

  def update(state, t, h):
    removal = np.outer(a[t, h] * kappa[t, h], kappa[t, h])
    transition = np.diag(decay[t, h]) - removal
    return transition @ state + np.outer(k[t, h], v[t, h])

  o = lt.recurrence(update, r, (6, 6))
  o = lt.head_norm(p['head_norm'], o, 6e-5)
  o = o + (r * k * p['r_k']).sum(-1, keepdims=True) * v
  return lt.linear(p['o_proj'], o.reshape(len(x), -1) * gate)


def test_equals_the_equations():
  lt.assert_equals(rwkv7.RWKV7, _expected, {'decay_rank': 3, 'gate_rank': 5})


def test_initial_decays_are_spread():
  layer, _ = lt.build(rwkv7.RWKV7)
  bias = np.asarray(layer.w_proj.up.bias[...])
  assert bias.min() < -3 < 0 < bias.max()


def test_options_are_checked():
  with pytest.raises(ValueError, match='gate_rank must be at least 1, got 0'):
    rwkv7.RWKV7Config(gate_rank=0)
