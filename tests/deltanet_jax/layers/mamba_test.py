"""Mamba against its recurrence (arXiv 2312.00752, algorithm 2)."""

from flax import nnx
import numpy as np
import pytest

from deltanet_jax.layers import mamba
from tests import layer_testing as lt


def _expected(p, x, layer):
  u = lt.linear(p['u_proj'], x)
  if layer.config.use_short_conv:
    u = lt.conv(p['conv'], u)
  u = lt.silu(u)
  dt = lt.softplus(lt.linear(p['dt_proj'], lt.linear(p['rank_proj'], u)))
  b, c = lt.linear(p['b_proj'], u), lt.linear(p['c_proj'], u)
  rates = -np.exp(p['a_log'])
  state, y = np.zeros_like(rates), np.zeros_like(u)
  for t in range(len(x)):
    decay = np.exp(dt[t][:, None] * rates)
    state = decay * state + np.outer(dt[t] * u[t], b[t])
    y[t] = state @ c[t] + p['skip'] * u[t]
  return lt.linear(p['o_proj'], y * lt.silu(lt.linear(p['z_proj'], x)))


@pytest.mark.parametrize(
  'options',
  [
    {'state_size': 3},
    {'state_size': 4, 'dt_rank': 2, 'use_short_conv': False, 'expansion': 1},
  ],
)
def test_equals_the_equations(options):
  lt.assert_equals(mamba.Mamba, _expected, options)


def test_initial_rates_and_steps_are_the_paper_s():
  layer = mamba.Mamba(64, 1, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(
    np.exp(layer.a_log[...]), np.tile(np.arange(1, 17), (128, 1)), rtol=1e-5
  )
  dt = lt.softplus(np.asarray(layer.dt_proj.bias[...], np.float64))
  assert 0.9e-3 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.101
  assert np.abs(layer.dt_proj.kernel[...]).max() <= 0.5


def test_options_are_checked():
  with pytest.raises(ValueError, match='state_size must be at least 1, got 0'):
    mamba.MambaConfig(state_size=0)
