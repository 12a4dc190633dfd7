"""The block-diagonal transition, written as the dense matrix it is."""

from flax import nnx
import numpy as np
import pytest

from deltanet_jax.layers import block_delta_net
from deltanet_jax.layers import delta_net
from tests import layer_testing as lt


def _expected(p, x, layer):
  blocks = layer.config.num_blocks
  q, k, v = (
    lt.heads(lt.silu(lt.conv(p[f'{n}_conv'], lt.linear(p[f'{n}_proj'], x))))
    for n in 'qkv'
  )
  beta = lt.heads(lt.sigmoid(lt.linear(p['beta_proj'], x)))  # [T, H, n]

  def parts(y):
    return lt.l2(y.reshape(*y.shape[:2], blocks, -1))

  q, k = parts(q), parts(k)

  def update(state, t, h):
    size = len(state) // blocks
    transition = np.eye(len(state))
    write = np.zeros(len(state))
    for j in range(blocks):
      rows = slice(j * size, (j + 1) * size)
      key = k[t, h, j]
      transition[rows, rows] -= beta[t, h, j] * np.outer(key, key)
      write[rows] = beta[t, h, j] * key
    return transition @ state + np.outer(write, v[t, h])

  o = lt.recurrence(update, q.reshape(*q.shape[:2], -1), (6, 6))
  o = lt.rms_norm(p['head_norm'], o).reshape(len(x), -1)
  return lt.linear(p['o_proj'], o)


@pytest.mark.parametrize('blocks', [1, 2, 3])
def test_equals_the_dense_recurrence(blocks):
  lt.assert_equals(
    block_delta_net.BlockDeltaNet, _expected, {'num_blocks': blocks}
  )


def test_one_block_is_delta_net():
  one, _ = lt.build(block_delta_net.BlockDeltaNet, {'num_blocks': 1})
  plain, _ = lt.build(delta_net.DeltaNet)
  nnx.update(plain, nnx.state(one))
  np.testing.assert_array_equal(one(lt.X)[0], plain(lt.X)[0])


def test_blocks_must_divide_the_head():
  with pytest.raises(ValueError, match='multiple of num_blocks, got 6 and 4'):
    lt.build(block_delta_net.BlockDeltaNet, {'num_blocks': 4})
