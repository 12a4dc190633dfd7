"""The mLSTM with its stabilizer against the plain recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_attention_with_normalizer
from pallas_kernels import stabilized_gates
from tests import testing

B, T, H, K, V = 2, 40, 2, 4, 3
NAMES = ('q', 'k', 'v', 'f', 'i')
INPUT_GATES = ('ordinary', 'huge', 'vanishing', 'alternating')


def _arguments(kind, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {'q': K, 'k': K, 'v': V}
  arrays = {n: rng.standard_normal((B, T, H, s)) for n, s in shapes.items()}
  noise = rng.standard_normal((B, T, H))
  arrays['f'] = -np.logaddexp(0, -2 - 2 * rng.standard_normal((B, T, H)))
  stretches = np.where(np.arange(T) % 7 < 3, 100, -100)[:, None]
  level = {'ordinary': 0, 'huge': 100, 'vanishing': -60}.get(kind, stretches)
  arrays['i'] = level + noise
  return {n: a.astype(np.float32) for n, a in arrays.items()}


def _mlstm(arguments, carry=None, segment_ids=None):
  """Returns the read-out and (state, normalizer, m) after the last token."""
  q, k, v, f, i = (arguments[n] for n in NAMES)
  state, m = (None, None) if carry is None else (carry[:2], carry[2])
  gates = stabilized_gates(f, i, initial_m=m, segment_ids=segment_ids)
  o, z, state = linear_attention_with_normalizer(
    q,
    k * gates.write[..., None],
    v,
    gates.g,
    initial_state=state,
    segment_ids=segment_ids,
    chunk_size=16,
  )
  floor = jnp.maximum(jnp.abs(z), gates.floor)
  return o / floor[..., None], (*state, gates.m)


_run = jax.jit(_mlstm)
_gates = jax.jit(stabilized_gates)


def _plain_mlstm(arguments, segment_ids=None):
  """Returns the read-out by the definition, which needs float64's range."""
  q, k, v, f, i = (arguments[n] for n in NAMES)
  outputs = np.zeros(v.shape)
  for b, h in np.ndindex(B, H):
    state, n, last = np.zeros((K, V)), np.zeros(K), 0
    for t in range(T):
      segment = 1 if segment_ids is None else segment_ids[b, t]
      if segment == 0:
        continue
      forget = np.exp(f[b, t, h]) * (last in (0, segment))
      write, last = np.exp(i[b, t, h]) * k[b, t, h], segment
      n = forget * n + write
      state = forget * state + np.outer(write, v[b, t, h])
      query = q[b, t, h] * K**-0.5
      outputs[b, t, h] = query @ state / max(abs(query @ n), 1.0)
  return outputs


def _float64(arguments):
  return {name: np.float64(a) for name, a in arguments.items()}


@pytest.mark.parametrize('with_segments', [False, True])
@pytest.mark.parametrize('kind', INPUT_GATES)
def test_the_mlstm_is_its_plain_recurrence(kind, with_segments):
  arguments = _arguments(kind)
  ids = testing.segments('padding_inside', B, T) if with_segments else None
  o, _ = _run(arguments, segment_ids=ids)
  expected = _plain_mlstm(_float64(arguments), ids)
  assert testing.error(np.float64(o), expected) < 1e-5


@jax.jit
def _gradient(arguments, weight):
  return jax.grad(lambda a: jnp.sum(_mlstm(a)[0] * weight))(arguments)


@pytest.mark.parametrize('kind', INPUT_GATES)
def test_leaving_out_the_gradient_of_the_maximum_is_exact(kind):
  arguments = _float64(_arguments(kind))
  rng = np.random.default_rng(1)
  # Read-outs near a zero of z are steep; a weight of 0 leaves them out.
  o = _plain_mlstm(arguments)
  weight = rng.standard_normal(o.shape) * (np.abs(o) < 5)
  gradient = _gradient(_arguments(kind), np.float32(weight))
  for name in NAMES:
    direction = rng.standard_normal(arguments[name].shape)
    step = 1e-6 * direction
    up, down = (
      np.sum(_plain_mlstm(arguments | {name: arguments[name] + s}) * weight)
      for s in (step, -step)
    )
    actual = np.sum(np.float64(gradient[name]) * direction)
    size = np.linalg.norm(np.float64(gradient[name]))
    assert abs(actual - (up - down) / 2e-6) < 1e-4 * size, name


@pytest.mark.parametrize('kind', INPUT_GATES)
@pytest.mark.parametrize('split', [1, 23])
def test_the_maximum_carries_a_split_sequence(split, kind):
  arguments = _arguments(kind)
  expected, carry = _run(arguments)
  head, tail = (
    {n: a[:, cut] for n, a in arguments.items()}
    for cut in (np.s_[:split], np.s_[split:])
  )
  first, between = _run(head)
  second, last = _run(tail, between)
  joined = np.concatenate([first, second], axis=1)
  assert testing.error(np.float64(joined), np.float64(expected)) < 1e-5
  for a, e in zip(last, carry, strict=True):
    assert testing.error(np.float64(a), np.float64(e)) < 1e-5


def _first_and_second(arguments, split):
  head, tail = (
    {n: a[:, cut] for n, a in arguments.items()}
    for cut in (np.s_[:split], np.s_[split:])
  )
  first, between = _mlstm(head)
  # Padding at the front: the maximum given outlives it, with its gradient.
  tail = {
    n: jnp.pad(a, [(0, 0), (2, 0)] + [(0, 0)] * (a.ndim - 2))
    for n, a in tail.items()
  }
  ids = jnp.ones(tail['f'].shape[:2], jnp.int32).at[:, :2].set(0)
  second, _ = _mlstm(tail, between, ids)
  return jnp.concatenate([first, second[:, 2:]], axis=1)


@pytest.mark.parametrize('kind', ['ordinary', 'alternating'])
def test_gradients_flow_through_a_split(kind):
  arguments = _arguments(kind)
  weight = np.cos(np.arange(B * T * H * V, dtype=np.float32))
  weight = weight.reshape(B, T, H, V)
  split = jax.jit(
    jax.grad(lambda a: jnp.sum(_first_and_second(a, 23) * weight))
  )
  expected, actual = _gradient(arguments, weight), split(arguments)
  for name in NAMES:
    e = np.float64(expected[name])
    assert testing.error(np.float64(actual[name]), e) < 1e-4, name


def test_the_gradient_of_the_first_maximum_is_that_of_the_state_it_scales():
  arguments = _arguments('ordinary')
  rng = np.random.default_rng(2)
  state, n = rng.standard_normal((B, H, K, V)), rng.standard_normal((B, H, K))
  carry = [jnp.asarray(a, jnp.float32) for a in (state, n, np.zeros((B, H)))]
  ids = jnp.ones((B, T), jnp.int32).at[:, :2].set(0)

  def loss(state, n, m):
    return jnp.sum(jnp.sin(_mlstm(arguments, (state, n, m), ids)[0]))

  dstate, dn, dm = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*carry)
  expected = np.sum(dstate * carry[0], axis=(2, 3)) + np.sum(dn * carry[1], 2)
  assert np.all(expected != 0)
  np.testing.assert_allclose(dm, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('m', [None, 1.5])
def test_gates_and_maxima_by_hand(m):
  f = jnp.array([-1.0, -2.0, -9.0, -3.0, -1.0, -1.0])[None, :, None]
  i = jnp.array([0.5, -4.0, 9.0, 100.0, -100.0, -2.0])[None, :, None]
  ids = jnp.array([[0, 1, 1, 1, 0, 2]])
  initial = None if m is None else jnp.full((1, 1), m)
  gates = _gates(f, i, initial_m=initial, segment_ids=ids)
  # The maxima are -4 (or 1.5 - 2), 9, 100 and, afresh, -2.
  first = -4.0 if m is None else -0.5
  g = [0, 0, -9 + first - 9, -3 + 9 - 100, 0, 0]
  write = [0, np.exp(-4 - first), 1, 1, 0, 1]
  tiny = np.finfo(np.float32).tiny
  floor = [1, np.exp(-first), np.exp(-9.0), tiny, 1, np.exp(2.0)]
  for actual, expected in zip(gates, (g, write, floor), strict=False):
    np.testing.assert_allclose(actual[0, :, 0], expected, rtol=1e-6)
  assert gates.m.tolist() == [[-2.0]]


def test_a_row_of_padding_leaves_the_maximum_alone():
  f = i = jnp.full((2, 3, 1), jnp.nan)
  ids = jnp.zeros((2, 3), jnp.int32)
  initial = jnp.array([[-jnp.inf], [2.5]])
  gates = _gates(f, i, initial_m=initial, segment_ids=ids)
  np.testing.assert_array_equal(gates.m, initial)
  for actual, expected in ((gates.g, 0), (gates.write, 0), (gates.floor, 1)):
    np.testing.assert_array_equal(actual, np.full((2, 3, 1), expected))


def test_rounding_of_the_maximum_does_not_add_up():
  # At m near 100 a rounding is 4e-6; a thousand of them would be seen.
  length = 1000
  f = jnp.full((1, length, 1), -0.0123)
  i = jnp.full((1, length, 1), -100.0).at[:, 0].set(99.7)
  gates = _gates(f, i)
  found = np.sum(np.float64(gates.g)) + np.float64(gates.m[0, 0])
  exact = np.float64(i[0, 0, 0]) + np.sum(np.float64(f)[0, 1:])
  np.testing.assert_allclose(found, exact, atol=2e-6)


def test_16_bit_gates_are_taken_in_float32():
  f, i = (jnp.full((1, 4, 1), x, jnp.bfloat16) for x in (-0.5, 3.0))
  gates = _gates(f, i)
  assert {a.dtype.name for a in gates} == {'float32'}
