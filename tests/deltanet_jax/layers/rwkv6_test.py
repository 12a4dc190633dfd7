"""RWKV-6 against its equations (arXiv 2404.05892, section 4.2)."""

import numpy as np
import pytest

from deltanet_jax.layers import rwkv6
from tests import layer_testing as lt


def _expected(p, x, layer):
  difference = lt.shift(x) - x
  m = x + difference * p['mu'][0]
  mixed = {}
  for index, use in enumerate('wkvrg'):
    hidden = np.tanh(m @ p['shift_down'][:, index])
    share = p['mu'][1 + index] + hidden @ p['shift_up'][index]
    mixed[use] = x + difference * share
  r, k, v = (lt.heads(lt.linear(p[f'{n}_proj'], mixed[n])) for n in 'rkv')
  w = np.tanh(lt.linear(p['w_proj']['down'], mixed['w']))
  w = lt.heads(np.exp(-np.exp(lt.linear(p['w_proj']['up'], w))))
  o = np.zeros_like(v)
  for h in range(lt.HEADS):
    state = np.zeros((6, 6))
    for t in range(len(x)):
      write = np.outer(k[t, h], v[t, h])
      o[t, h] = (state + np.diag(p['bonus'][h]) @ write).T @ r[t, h]
      state = np.diag(w[t, h]) @ state + write
  o = lt.head_norm(p['head_norm'], o, 64e-5).reshape(len(x), -1)
  gate = lt.silu(lt.linear(p['gate_proj'], mixed['g']))
  return lt.linear(p['o_proj'], o * gate)


def test_equals_the_equations():
  lt.assert_equals(rwkv6.RWKV6, _expected, {'shift_rank': 3, 'decay_rank': 5})


def test_options_are_checked():
  with pytest.raises(ValueError, match='shift_rank must be at least 1, got 0'):
    rwkv6.RWKV6Config(shift_rank=0)
