"""Initial values and the formula of decay gates."""

from flax import nnx
import numpy as np

from deltanet_jax.layers import gates
from tests import layer_testing as lt


def test_step_sizes_are_log_uniform():
  bias = np.asarray(gates.initial_dt_bias(nnx.Rngs(0), (4000,))[...])
  log_dt = np.log10(lt.softplus(bias.astype(np.float64)))
  assert -3.01 < log_dt.min() < -2.99 and -1.01 < log_dt.max() < -0.99
  assert abs(log_dt.mean() + 2) < 0.05


def test_rates_are_uniform_and_their_logarithm_finite():
  rates = gates.initial_rates(nnx.Rngs(0), (4000,), 0, 16)[...]
  rates = np.exp(np.asarray(rates))
  assert 0 < rates.min() < 0.1 and 15.9 < rates.max() < 16
  assert abs(rates.mean() - 8) < 0.3


def test_log_decay():
  a = np.array([[[0.5, -2.0]]], np.float32)
  a_log, bias = nnx.Param(np.float32([0, 1])), nnx.Param(np.float32([1, 2]))
  expected = -np.exp([0, 1]) * lt.softplus(np.array([1.5, 0.0]))
  np.testing.assert_allclose(
    gates.log_decay(a, a_log, bias)[0, 0], expected, rtol=1e-6
  )
