import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from deltanet_jax.layers import ring_attention

B, T, H, G, K = 2, 16, 4, 2, 8


def _arguments():
  draw = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(draw.standard_normal((B, T, n, K)), jnp.float32)
    for n in (H, G, G)
  )
  runs = np.cumsum(draw.random((B, T)) < 0.2, axis=1)
  runs[0, 5:8] = runs[1, 12:] = -1  # Padding.
  return (q, k, v), jnp.asarray(runs, jnp.int32)


def _plain(arrays, runs, window):
  q, k, v = arrays
  k, v = (jnp.repeat(y, H // G, axis=2) for y in (k, v))
  distance = np.arange(T)[:, None] - np.arange(T)
  seen = jnp.asarray((distance >= 0) & (distance < (window or T)))[None]
  if runs is not None:
    seen &= (runs[:, :, None] == runs[:, None]) & (runs >= 0)[:, None]
  logits = jnp.einsum('bthk,bshk->bhts', q, k) / K**0.5
  p = jnp.where(seen[:, None], jnp.exp(logits), 0)
  total = p.sum(-1, keepdims=True)
  p = p / jnp.where(total > 0, total, 1)
  return jnp.einsum('bhts,bshk->bthk', p, v)


def _value_and_gradients(attend):
  def loss(arrays):
    o = attend(arrays)
    return jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape)), o

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize(
  ('shape', 'window'),
  [((8, 1), None), ((8, 1), 4), ((4, 2), 6), ((1, 1), 3)],
)
def test_equals_attention_over_the_whole_row(shape, window, packed):
  arrays, runs = _arguments()
  runs = runs if packed else None
  expected = _value_and_gradients(lambda a: _plain(a, runs, window))(arrays)
  mesh = jax.make_mesh(
    shape,
    ('sequence', 'tensor'),
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[: shape[0] * shape[1]],
  )
  with jax.set_mesh(mesh):
    found = _value_and_gradients(
      lambda a: ring_attention.ring_attention(*a, runs, window=window)
    )(arrays)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(('window', 'sends'), [(None, 7), (2, 1), (4, 2)])
def test_a_window_ends_the_turn(window, sends):
  arrays, _ = _arguments()
  mesh = jax.make_mesh((8,), ('sequence',), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    text = str(
      jax.make_jaxpr(
        lambda a: ring_attention.ring_attention(*a, None, window=window)
      )(arrays)
    )
  assert text.count('ppermute') == 3 * sends  # k, v and runs.
