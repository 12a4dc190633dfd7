"""What must hold exactly, or up to rounding, for every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import delta_rule
from pallas_kernels.delta_rule import api
from pallas_kernels.delta_rule import arg_specs
from tests import testing

IMPLEMENTATIONS = tuple(
  name for name, reason in api.DELTA_RULE.explain() if reason is None
)
SPEC = arg_specs.ArgSpec(name='base', B=2, T=70, H=1, HV=2, K=16, V=8)
NAMES = testing.DIFFERENTIABLE

for_each = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)


def _arguments(dtype='float32', spec=SPEC, seed=0):
  problem = testing.make_problem(spec, seed=seed)
  return dict(zip(NAMES, testing.as_arrays(problem, dtype), strict=True))


def _loss(arguments, segment_ids=None, *, implementation):
  o, state = delta_rule(
    **arguments,
    segment_ids=segment_ids,
    chunk_size=16,
    implementation=implementation,
  )
  weight = jnp.cos(jnp.arange(o.size, dtype=o.dtype)).reshape(o.shape)
  return jnp.sum(o * weight).astype(jnp.float32) + jnp.sum(state**2)


@functools.cache
def _run(implementation):
  return jax.jit(
    functools.partial(delta_rule, chunk_size=16, implementation=implementation)
  )


@functools.cache
def _gradient(implementation):
  return jax.jit(
    jax.grad(functools.partial(_loss, implementation=implementation))
  )


def _part(arguments, start, stop):
  """Cuts the time axis; the state is left out."""
  return {n: a[:, start:stop] for n, a in arguments.items() if n != NAMES[-1]}


def _assert_close(actual, expected):
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert a.shape == e.shape
    assert testing.error(np.float64(a), np.float64(e)) < 2e-6


def _assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@for_each
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_future_changes_no_bit_of_the_past(implementation, dtype):
  before = _arguments(dtype)
  other = _arguments(dtype, seed=1)
  o, _ = _run(implementation)(**before)
  for start in (1, 7, 16, 17, 48, 69):
    changed = {
      n: a.at[:, start:].set(other[n][:, start:])
      for n, a in _part(before, 0, None).items()
    }
    changed['v'] = changed['v'].at[:, start:].multiply(100)
    state = {NAMES[-1]: before[NAMES[-1]]}
    o_changed, _ = _run(implementation)(**changed, **state)
    np.testing.assert_array_equal(o[:, :start], o_changed[:, :start])
    assert not np.array_equal(o[:, start], o_changed[:, start])


@for_each
def test_the_past_has_no_gradient_to_the_future(implementation):
  arguments = _arguments()

  def first_outputs(arguments):
    o, _ = delta_rule(**arguments, chunk_size=16, implementation=implementation)
    return jnp.sum(o[:, :23])

  gradients = jax.jit(jax.grad(first_outputs))(arguments)
  for name in ('q', 'k', 'v', 'beta'):
    assert not np.any(gradients[name][:, 23:])
    assert np.all(np.any(gradients[name][:, :23], axis=(0, 2)))


@for_each
@pytest.mark.parametrize('split', [1, 16, 55])
def test_the_state_carries_a_split_sequence(implementation, split):
  arguments = _arguments()
  run = _run(implementation)
  o, final = run(**arguments)
  state = arguments[NAMES[-1]]
  first, state = run(**_part(arguments, 0, split), initial_state=state)
  second, state = run(**_part(arguments, split, None), initial_state=state)
  _assert_close((jnp.concatenate([first, second], 1), state), (o, final))


@for_each
def test_segments_are_separate_runs(implementation):
  arguments = _arguments()
  lengths, run = (20, 1, 49), _run(implementation)
  ids = jnp.repeat(jnp.arange(1, 4, dtype=jnp.int32), jnp.array(lengths))
  o, final = run(**arguments, segment_ids=jnp.stack([ids, ids]))
  outputs, start, state = [], 0, arguments[NAMES[-1]]
  for length in lengths:
    part = _part(arguments, start, start + length)
    output, last = run(**part, initial_state=state)
    outputs.append(output)
    start, state = start + length, jnp.zeros_like(state)
  _assert_close((o, final), (jnp.concatenate(outputs, 1), last))


@for_each
def test_an_id_may_come_back_as_another_segment(implementation):
  arguments = _arguments()
  ids = jnp.repeat(jnp.array([1, 2, 1]), jnp.array([20, 30, 20]))
  renamed = jnp.repeat(jnp.array([7, 8, 9]), jnp.array([20, 30, 20]))
  results = [
    _run(implementation)(**arguments, segment_ids=jnp.stack([i, i]))
    for i in (ids, renamed)
  ]
  _assert_equal(*results)


def _padding():
  ids = np.ones(SPEC.T, np.int32)
  ids[[0, 1, 30, 31, 32, 47, 48, 69]] = 0
  return jnp.stack([jnp.asarray(ids), jnp.zeros_like(ids)])


@for_each
@pytest.mark.parametrize('garbage', [np.nan, np.inf])
def test_garbage_at_padding_does_not_leak(implementation, garbage):
  clean, ids = _arguments(), _padding()
  padding = ids == 0
  dirty = {
    n: jnp.where(padding.reshape(2, -1, *(1,) * (a.ndim - 2)), garbage, a)
    for n, a in _part(clean, 0, None).items()
  } | {NAMES[-1]: clean[NAMES[-1]]}
  results = []
  for arguments in (clean, dirty):
    o, state = _run(implementation)(**arguments, segment_ids=ids)
    results.append((o, state, _gradient(implementation)(arguments, ids)))
  _assert_equal(*results)
  o, state, gradients = results[1]
  assert not np.any(np.asarray(o)[padding])
  np.testing.assert_array_equal(state[1], clean[NAMES[-1]][1])
  for name in ('q', 'k', 'v', 'beta'):
    assert not np.any(np.asarray(gradients[name])[padding])


@for_each
def test_one_segment_without_padding_is_no_segments(implementation):
  arguments = _arguments()
  ids = jnp.full((SPEC.B, SPEC.T), 3)
  _assert_close(
    _run(implementation)(**arguments, segment_ids=ids),
    _run(implementation)(**arguments),
  )


@for_each
def test_two_runs_are_bitwise_equal(implementation):
  arguments = _arguments()
  gradient = _gradient(implementation)
  _assert_equal(gradient(arguments), gradient(arguments))


@for_each
def test_jit_vmap_and_remat_change_nothing(implementation):
  arguments = _arguments()
  loss = functools.partial(_loss, implementation=implementation)
  expected = jax.grad(loss)(arguments)
  _assert_close(_gradient(implementation)(arguments), expected)
  _assert_close(jax.jit(jax.grad(jax.checkpoint(loss)))(arguments), expected)
  stacked = [_arguments(seed=seed) for seed in (0, 1, 2)]
  batched = jax.tree.map(lambda *a: jnp.stack(a), *stacked)
  gradients = jax.jit(jax.vmap(jax.grad(loss)))(batched)
  for i, one in enumerate(stacked):
    _assert_close(
      jax.tree.map(lambda g, i=i: g[i], gradients),
      _gradient(implementation)(one),
    )


@for_each
def test_vmap_over_segment_ids_alone(implementation):
  arguments = _arguments()
  ids = jnp.stack([_padding(), jnp.ones((SPEC.B, SPEC.T), jnp.int32)])
  run = functools.partial(_run(implementation), **arguments)
  o, state = jax.vmap(lambda i: run(segment_ids=i))(ids)
  for i in range(2):
    _assert_close((o[i], state[i]), run(segment_ids=ids[i]))


@for_each
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('beta_dtype', ['float32', 'bfloat16'])
def test_dtypes_of_results_and_cotangents(implementation, dtype, beta_dtype):
  arguments = _arguments(dtype)
  arguments['beta'] = arguments['beta'].astype(beta_dtype)
  o, state = _run(implementation)(**arguments)
  assert (o.dtype, state.dtype) == (dtype, jnp.float32)
  gradients = _gradient(implementation)(arguments)
  for name, argument in arguments.items():
    assert gradients[name].dtype == argument.dtype
    assert gradients[name].shape == argument.shape


@for_each
@pytest.mark.parametrize('scale', [None, 1.0, 0.25])
def test_scale(implementation, scale):
  arguments = _arguments()
  problem = testing.make_problem(SPEC)
  expected = testing.token_recurrence(problem.arguments, scale=scale)
  actual = delta_rule(**arguments, scale=scale, implementation=implementation)
  _assert_close(actual, expected)


@for_each
def test_normalize_qk_is_normalizing_first(implementation):
  arguments = _arguments()
  arguments['k'] = 3 * arguments['k']
  expected = dict(arguments)
  for name in ('q', 'k'):
    x = np.float64(arguments[name])
    norm = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    expected[name] = jnp.float32(x / norm)
  actual = _run(implementation)
  _assert_close(
    delta_rule(**arguments, normalize_qk=True, implementation=implementation),
    actual(**expected),
  )


def _stack_gradient(implementation):
  """Returns the gradient of layers in a scan, all inputs from one product."""
  rows, length, heads, keys, values = 32, 7, 2, 16, 32
  sizes = np.cumsum([keys, keys, values, 1, 1]) * heads
  x = jax.random.normal(jax.random.key(1), (rows, length, values * heads))
  weights = jax.random.normal(
    jax.random.key(9), (2, values * heads, int(sizes[-1]))
  )

  def layer(x, w):
    q, k, v, b, g = jnp.split(x @ w, sizes[:-1], axis=-1)
    q, k, v = (a.reshape(rows, length, heads, -1) for a in (q, k, v))
    o, _ = delta_rule(
      q,
      k,
      v,
      jax.nn.sigmoid(b),
      -4 * jax.nn.softplus(g - 3),
      normalize_qk=True,
      implementation=implementation,
    )
    return x + o.reshape(x.shape), None

  def loss(w):
    return jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2)

  return jax.jit(jax.grad(loss))(weights / 10)


def test_gradients_of_layers_in_a_scan_agree():
  # With float64 in a part of the scan, XLA's CPU backend once made NaN of them.
  _assert_close(_stack_gradient('xla'), _stack_gradient('recurrent'))
