"""What must hold exactly, or up to rounding, for every implementation."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from pallas_kernels import delta_rule
from pallas_kernels import diagonal_plus_low_rank
from pallas_kernels.diagonal_plus_low_rank import api
from pallas_kernels.diagonal_plus_low_rank import arg_specs
from tests import testing
from tests.pallas_kernels.diagonal_plus_low_rank import problems

IMPLEMENTATIONS = tuple(
  i.name for i in api.DIAGONAL_PLUS_LOW_RANK.implementations
)
SPEC = arg_specs.ArgSpec(name='base', B=2, T=70, H=1, HV=2, K=16, V=8)
STATE = 'initial_state'

for_each = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)


def _arguments(dtype='float32', seed=0, gate='head_random'):
  problem = problems.make_problem(SPEC, 'rwkv7', seed=seed, gate=gate)
  arrays = testing.as_arrays(problem, dtype)
  return dict(zip(problem.arguments, arrays, strict=True))


def _loss(arguments, segment_ids=None, *, implementation):
  o, state = diagonal_plus_low_rank(
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
    functools.partial(
      diagonal_plus_low_rank, chunk_size=16, implementation=implementation
    )
  )


@functools.cache
def _gradient(implementation):
  return jax.jit(
    jax.grad(functools.partial(_loss, implementation=implementation))
  )


def _tokens(arguments, start=0, stop=None):
  """Cuts the time axis; the state is left out."""
  return {n: x[:, start:stop] for n, x in arguments.items() if n != STATE}


def _assert_close(actual, expected, limit=2e-6):
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert a.shape == e.shape
    assert testing.error(np.float64(a), np.float64(e)) < limit


def _assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@for_each
@pytest.mark.parametrize(
  ('dtype', 'gate'),
  [('float32', 'channel_random'), ('bfloat16', 'head_random')],
)
def test_the_future_changes_no_bit_of_the_past(implementation, dtype, gate):
  before = _arguments(dtype, gate=gate)
  other = _arguments(dtype, seed=1, gate=gate)
  o, _ = _run(implementation)(**before)
  for start in (1, 7, 16, 17, 48, 69):
    changed = {
      n: x.at[:, start:].set(other[n][:, start:])
      for n, x in _tokens(before).items()
    }
    changed['v'] = changed['v'].at[:, start:].multiply(100)
    o_changed, _ = _run(implementation)(**changed, **{STATE: before[STATE]})
    np.testing.assert_array_equal(o[:, :start], o_changed[:, :start])
    assert not np.array_equal(o[:, start], o_changed[:, start])


@for_each
def test_the_past_has_no_gradient_to_the_future(implementation):
  def first_outputs(arguments):
    o, _ = diagonal_plus_low_rank(
      **arguments, chunk_size=16, implementation=implementation
    )
    return jnp.sum(o[:, :23])

  gradients = jax.jit(jax.grad(first_outputs))(_arguments())
  for name, gradient in _tokens(gradients).items():
    assert not np.any(gradient[:, 23:]), name
    # The last of the tokens is read by nothing but its own query.
    assert np.all(np.any(gradient[:, :22], axis=(0, 2))), name


def test_b_reads_before_the_decay_and_the_write_of_its_token():
  one = jnp.ones((1, 1, 1, 1))
  for implementation in IMPLEMENTATIONS:
    _, state = diagonal_plus_low_rank(
      one,
      2 * one,
      3 * one,
      5 * one,
      7 * one,
      jnp.log(0.5 * one),
      initial_state=11 * one,
      implementation=implementation,
    )
    # 0.5 * 11 + 5 * (7 * 11) + 2 * 3
    np.testing.assert_allclose(state, 396.5, rtol=1e-6)


@for_each
def test_the_state_carries_a_split_sequence(implementation):
  arguments = _arguments()
  run = _run(implementation)
  o, final = run(**arguments)
  for split in np.random.default_rng(0).integers(1, SPEC.T, 2):
    first, state = run(
      **_tokens(arguments, 0, split), initial_state=arguments[STATE]
    )
    second, state = run(**_tokens(arguments, split), initial_state=state)
    _assert_close((jnp.concatenate([first, second], 1), state), (o, final))


@for_each
def test_segments_are_separate_runs(implementation):
  arguments = _arguments()
  lengths, run = (20, 1, 49), _run(implementation)
  ids = jnp.repeat(jnp.array([1, 2, 1]), jnp.array(lengths))
  o, final = run(**arguments, segment_ids=jnp.stack([ids, ids]))
  outputs, start, state = [], 0, arguments[STATE]
  for length in lengths:
    part = _tokens(arguments, start, start + length)
    output, last = run(**part, initial_state=state)
    outputs.append(output)
    start, state = start + length, jnp.zeros_like(state)
  _assert_close((o, final), (jnp.concatenate(outputs, 1), last))


@for_each
@pytest.mark.parametrize('garbage', [np.nan, np.inf])
def test_garbage_at_padding_does_not_leak(implementation, garbage):
  ids = np.ones((SPEC.B, SPEC.T), np.int32)
  ids[0, [0, 1, 30, 31, 32, 47, 48, 69]] = 0
  ids[1] = 0
  padding, clean = ids == 0, _arguments()
  dirty = {
    n: jnp.where(padding.reshape(2, -1, *(1,) * (x.ndim - 2)), garbage, x)
    for n, x in _tokens(clean).items()
  } | {STATE: clean[STATE]}
  results = []
  for arguments in (clean, dirty):
    o, state = _run(implementation)(**arguments, segment_ids=ids)
    results.append((o, state, _gradient(implementation)(arguments, ids)))
  _assert_equal(*results)
  o, state, gradients = results[1]
  assert not np.any(np.asarray(o)[padding])
  np.testing.assert_array_equal(state[1], clean[STATE][1])
  for gradient in _tokens(gradients).values():
    assert not np.any(np.asarray(gradient)[padding])


@for_each
def test_two_runs_are_bitwise_equal(implementation):
  arguments = _arguments()
  gradient = _gradient(implementation)
  _assert_equal(gradient(arguments), gradient(arguments))


@for_each
def test_vmap_and_remat_change_nothing(implementation):
  arguments = [_arguments(seed=seed) for seed in (0, 1)]
  loss = functools.partial(_loss, implementation=implementation)
  expected = [_gradient(implementation)(one) for one in arguments]
  rematerialized = jax.jit(jax.grad(jax.checkpoint(loss)))(arguments[0])
  _assert_close(rematerialized, expected[0])
  batched = jax.tree.map(lambda *x: jnp.stack(x), *arguments)
  gradients = jax.jit(jax.vmap(jax.grad(loss)))(batched)
  _assert_close(gradients, jax.tree.map(lambda *x: jnp.stack(x), *expected))


@for_each
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_dtypes_of_results_and_cotangents(implementation, dtype):
  arguments = _arguments(dtype)
  o, state = jax.eval_shape(_run(implementation), **arguments)
  assert (o.dtype, state.dtype) == (dtype, jnp.float32)
  gradients = jax.eval_shape(_gradient(implementation), arguments)
  for name, argument in arguments.items():
    assert gradients[name].dtype == argument.dtype
    assert gradients[name].shape == argument.shape


@for_each
def test_scale(implementation):
  arguments = _arguments()
  problem = problems.make_problem(SPEC, gate='head_random')
  for scale in (None, 0.25):
    expected = problems.token_recurrence(problem.arguments, scale=scale)
    actual = diagonal_plus_low_rank(
      **arguments, scale=scale, implementation=implementation
    )
    _assert_close(actual, expected)


@for_each
@pytest.mark.parametrize('gate', [None, 'head_random'])
def test_the_delta_rule_is_a_case(implementation, gate):
  problem = problems.make_problem(SPEC, 'rwkv7', gate=gate)
  rng = np.random.default_rng(5)
  q, k, v = (jnp.asarray(problem.arguments[n], jnp.float32) for n in 'qbv')
  v = v[:, :, :1]  # One beta per value head: as many heads as keys.
  beta = jnp.asarray(rng.uniform(0, 2, v.shape[:-1]), jnp.float32)
  written = beta[..., None] * k
  a, g = -written, None
  if gate is not None:
    # The delta rule reads after the decay.
    g = jnp.asarray(problem.arguments['g'][:, :, :1], jnp.float32)
    a = a * jnp.exp(g)[..., None]
  actual = diagonal_plus_low_rank(
    q, written, v, a, k, g, implementation=implementation
  )
  _assert_close(actual, delta_rule(q, k, v, beta, g))


@pytest.mark.parametrize('axis', ['data', 'tensor', 'sequence'])
def test_a_mesh_changes_nothing(axis):
  two = {n: jnp.concatenate([x, x], 1) for n, x in _arguments().items()}
  two = {n: x for n, x in two.items() if n != STATE}
  keys = ('q', 'k', 'a', 'b')
  two |= {n: jnp.concatenate([two[n], -two[n]], 2) for n in keys}
  expected = _run('xla')(**two)
  mesh = jax.make_mesh(
    (2,), (axis,), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
  )
  with jax.set_mesh(mesh):
    actual = diagonal_plus_low_rank(**two, chunk_size=16, implementation='xla')
  _assert_close(actual, expected)
