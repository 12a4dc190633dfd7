"""mLSTM against its equations without stabiliser (arXiv 2405.04517, 19-27)."""

from flax import nnx
import numpy as np
import pytest

from deltanet_jax.layers import mlstm
from tests import layer_testing as lt


def _expected(p, x, layer):
  cap = layer.config.gate_cap
  q, k, v = (lt.heads(lt.linear(p[f'{n}_proj'], x)) for n in 'qkv')
  q = q / np.sqrt(q.shape[-1])
  i = np.exp(cap * np.tanh(lt.linear(p['i_proj'], x) / cap))
  f = lt.sigmoid(cap * np.tanh(lt.linear(p['f_proj'], x) / cap))

  def write(values):
    def update(state, t, h):
      return f[t, h] * state + i[t, h] * np.outer(k[t, h], values[t, h])

    return lt.recurrence(update, q, (q.shape[-1], values.shape[-1]))

  z = write(np.ones((*v.shape[:2], 1)))
  h = write(v) / np.maximum(np.abs(z), 1)
  h = lt.head_norm(p['head_norm'], h, lt.EPS).reshape(len(x), -1)
  return lt.linear(p['o_proj'], h * lt.sigmoid(lt.linear(p['gate_proj'], x)))


@pytest.mark.parametrize(
  'options', [{}, {'gate_cap': 3.0, 'key_expansion': 1.0}]
)
def test_equals_the_equations(options):
  lt.assert_equals(mlstm.MLSTM, _expected, options)


def test_gates_start_nearly_closed_and_slow():
  fresh = mlstm.MLSTM(8, 4, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(fresh.i_proj.bias[...], -10)
  np.testing.assert_allclose(fresh.f_proj.bias[...], [3, 4, 5, 6])


def test_options_are_checked():
  with pytest.raises(ValueError, match='gate_cap must be above 0, got 0'):
    mlstm.MLSTMConfig(gate_cap=0.0)
