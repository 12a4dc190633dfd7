"""The chunked scan: any chunk, resets, and no array over all states."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax.layers import selective_scan

RANDOM = np.random.default_rng(0)
BATCH, LENGTH, WIDTH, STATES = 2, 11, 3, 4
ARRAYS = {
  'u': RANDOM.normal(size=(BATCH, LENGTH, WIDTH)),
  'dt': RANDOM.uniform(0, 2, size=(BATCH, LENGTH, WIDTH)),
  'a': -RANDOM.uniform(0.1, 3, size=(WIDTH, STATES)),
  'b': RANDOM.normal(size=(BATCH, LENGTH, STATES)),
  'c': RANDOM.normal(size=(BATCH, LENGTH, STATES)),
}
ARRAYS = {name: x.astype(np.float32) for name, x in ARRAYS.items()}
STATE = RANDOM.normal(size=(BATCH, WIDTH, STATES)).astype(np.float32)
RESETS = np.zeros((BATCH, LENGTH), bool)
RESETS[0, 6] = True


def _expected():
  u, dt, a, b, c = (x.astype(np.float64) for x in ARRAYS.values())
  state, outputs = STATE.astype(np.float64), []
  for t in range(LENGTH):
    state = np.where(RESETS[:, t, None, None], 0, state)
    write = (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
    state = np.exp(dt[:, t, :, None] * a) * state + write
    outputs.append(np.einsum('bdn,bn->bd', state, c[:, t]))
  return np.stack(outputs, 1), state


@pytest.mark.parametrize('chunk', [1, 3, 4, 100])
def test_equals_the_recurrence(chunk):
  y, state = selective_scan.selective_scan(
    **ARRAYS, initial_state=STATE, resets=RESETS, chunk_size=chunk
  )
  expected, expected_state = _expected()
  np.testing.assert_allclose(y, expected, atol=1e-5)
  np.testing.assert_allclose(state, expected_state, atol=1e-5)


def test_gradients_do_not_hang_on_the_chunk():
  def loss(arrays, chunk):
    y, state = selective_scan.selective_scan(
      **arrays, initial_state=jnp.asarray(STATE), chunk_size=chunk
    )
    return jnp.sum(y**2) + jnp.sum(state)

  gradient = jax.grad(loss)
  whole, chunked = gradient(ARRAYS, LENGTH), gradient(ARRAYS, 4)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    chunked,
    whole,
  )


def test_no_array_holds_all_states():
  """In the forward and the backward pass, at sizes where it would show."""
  length, width, states = 512, 32, 32
  shapes = {
    'u': (1, length, width),
    'dt': (1, length, width),
    'a': (width, states),
    'b': (1, length, states),
    'c': (1, length, states),
  }
  arrays = {name: jnp.ones(shape) for name, shape in shapes.items()}

  def loss(arrays):
    y, _ = selective_scan.selective_scan(
      **arrays, initial_state=jnp.zeros((1, width, states))
    )
    return jnp.sum(y)

  compiled = jax.jit(jax.grad(loss)).lower(arrays).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 4 * length * width * states
