"""RWKV-4 against its equations (arXiv 2305.13048, equations 11-16)."""

import jax
import numpy as np

from deltanet_jax.layers import rwkv4
from tests import layer_testing as lt


def _expected(p, x, layer):
  before = lt.shift(x)
  x_k, x_v, x_r = (mu * x + (1 - mu) * before for mu in p['mu'])
  k, v = lt.linear(p['k_proj'], x_k), lt.linear(p['v_proj'], x_v)
  r = lt.sigmoid(lt.linear(p['r_proj'], x_r))
  w = np.exp(p['time_decay'])
  o = np.zeros_like(v)
  for t in range(len(x)):
    exponents = [-(t - 1 - i) * w + k[i] for i in range(t)]
    weights = np.exp([*exponents, p['bonus'] + k[t]])
    o[t] = (weights * v[: t + 1]).sum(0) / weights.sum(0)
  return lt.linear(p['o_proj'], r * o)


def test_equals_the_equations():
  lt.assert_equals(rwkv4.RWKV4, _expected)


def test_large_exponents_do_not_overflow():
  layer, _ = lt.build(rwkv4.RWKV4)
  layer.k_proj.kernel.set_value(layer.k_proj.kernel[...] * 300)
  y, _ = jax.jit(lambda x: layer(x))(lt.X)
  assert np.all(np.isfinite(y))
  assert np.max(np.abs(y)) > 1e-3
