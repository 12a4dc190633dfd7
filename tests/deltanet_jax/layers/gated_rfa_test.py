"""Gated RFA against its equations (arXiv 2103.02143, section 3.2)."""

import numpy as np
import pytest

from deltanet_jax.layers import gated_rfa
from tests import layer_testing as lt


def _expected(p, x, layer):
  directions = np.asarray(layer.directions(), np.float64)

  def features(y):
    y = np.einsum('thk,hmk->thm', lt.l2(y) * p['sigma'], directions)
    y = np.concatenate([np.sin(y), np.cos(y)], axis=-1)
    return y / np.sqrt(layer.config.num_directions)

  q, k, v = (lt.heads(lt.linear(p[f'{n}_proj'], x)) for n in 'qkv')
  q, k = features(q), features(k)
  g = lt.sigmoid(lt.linear(p['g_proj'], x))

  def write(values):
    def update(state, t, h):
      written = (1 - g[t, h]) * np.outer(k[t, h], values[t, h])
      return g[t, h] * state + written

    return lt.recurrence(update, q, (q.shape[-1], values.shape[-1]))

  z = write(np.ones((*v.shape[:2], 1)))
  o = (write(v) / np.maximum(z, 1e-3)).reshape(len(x), -1)
  return lt.linear(p['o_proj'], o)


def test_equals_the_equations():
  lt.assert_equals(gated_rfa.GatedRFA, _expected, {'num_directions': 9})


def test_features_estimate_the_gaussian_kernel():
  layer, _ = lt.build(gated_rfa.GatedRFA, {'num_directions': 20_000})
  layer.sigma.set_value(np.ones((lt.HEADS, 6), np.float32))
  x = np.random.default_rng(0).normal(size=(1, 4, lt.HEADS, 6))
  phi = np.asarray(layer._features(x.astype(np.float32)))
  units = lt.l2(x)
  distance = ((units[:, :, None] - units[:, None]) ** 2).sum(-1)
  estimate = np.einsum('bthm,bshm->btsh', phi, phi)
  np.testing.assert_allclose(estimate, np.exp(-distance / 2), atol=0.03)


def test_options_are_checked():
  with pytest.raises(ValueError, match='num_directions must be at least 1'):
    gated_rfa.GatedRFAConfig(num_directions=0)
