"""What must hold exactly, or up to rounding, for every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_with_normalizer
from pallas_kernels.linear_attention import api
from pallas_kernels.linear_attention import arg_specs
from tests import testing
from tests.pallas_kernels.linear_attention import problems

IMPLEMENTATIONS = tuple(i.name for i in api.LINEAR_ATTENTION.implementations)
SPEC = arg_specs.ArgSpec(
  name='base', B=2, T=70, H=2, HV=4, K=4, V=3, gate='head', has_bonus=True
)
OVER_TIME = ('q', 'k', 'v', 'g')

for_each = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)


def _arguments(dtype='float32', seed=0):
  return problems.as_arrays(problems.make_problem(SPEC, seed=seed), dtype)


def _loss(arguments, segment_ids=None, *, implementation):
  o, state = linear_attention(
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
      linear_attention, chunk_size=16, implementation=implementation
    )
  )


@functools.cache
def _gradient(implementation):
  return jax.jit(
    jax.grad(functools.partial(_loss, implementation=implementation))
  )


def _part(arguments, start, stop):
  """Cuts the time axis; the first state is left out."""
  part = {n: arguments[n][:, start:stop] for n in OVER_TIME}
  return part | {'bonus': arguments['bonus']}


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
    changed = before | {
      n: before[n].at[:, start:].set(other[n][:, start:]) for n in OVER_TIME
    }
    changed['v'] = changed['v'].at[:, start:].multiply(100)
    o_changed, _ = _run(implementation)(**changed)
    np.testing.assert_array_equal(o[:, :start], o_changed[:, :start])
    assert not np.array_equal(o[:, start], o_changed[:, start])


@for_each
def test_a_bonus_reads_before_the_decay_of_its_token(implementation):
  arguments = _arguments()
  o, _ = _run(implementation)(**arguments)
  g = arguments['g'].at[:, 23].set(-20)
  o_changed, _ = _run(implementation)(**arguments | {'g': g})
  np.testing.assert_array_equal(o[:, :24], o_changed[:, :24])
  assert not np.array_equal(o[:, 24], o_changed[:, 24])


@for_each
@pytest.mark.parametrize('split', [1, 16, 55])
def test_the_state_carries_a_split_sequence(implementation, split):
  arguments = _arguments()
  run = _run(implementation)
  o, final = run(**arguments)
  state = arguments['initial_state']
  first, state = run(**_part(arguments, 0, split), initial_state=state)
  second, state = run(**_part(arguments, split, None), initial_state=state)
  _assert_close((jnp.concatenate([first, second], 1), state), (o, final))


@for_each
def test_segments_are_separate_runs(implementation):
  arguments = _arguments()
  lengths, run = (20, 1, 49), _run(implementation)
  ids = jnp.repeat(jnp.arange(1, 4, dtype=jnp.int32), jnp.array(lengths))
  o, final = run(**arguments, segment_ids=jnp.stack([ids, ids]))
  outputs, start, state = [], 0, arguments['initial_state']
  for length in lengths:
    part = _part(arguments, start, start + length)
    output, last = run(**part, initial_state=state)
    outputs.append(output)
    start, state = start + length, jnp.zeros_like(state)
  _assert_close((o, final), (jnp.concatenate(outputs, 1), last))


@for_each
def test_garbage_at_padding_does_not_leak(implementation):
  ids = np.ones((SPEC.B, SPEC.T), np.int32)
  ids[0, [0, 1, 30, 31, 32, 47, 48, 69]] = 0
  ids[1] = 0
  padding = ids == 0
  clean = _arguments()
  dirty = clean | {
    n: jnp.where(padding.reshape(2, -1, *(1,) * (a.ndim - 2)), np.nan, a)
    for n, a in clean.items()
    if n in OVER_TIME
  }
  results = []
  for arguments in (clean, dirty):
    o, state = _run(implementation)(**arguments, segment_ids=ids)
    results.append((o, state, _gradient(implementation)(arguments, ids)))
  _assert_equal(*results)
  o, state, gradients = results[1]
  assert not np.any(np.asarray(o)[padding])
  np.testing.assert_array_equal(state[1], clean['initial_state'][1])
  for name in OVER_TIME:
    assert not np.any(np.asarray(gradients[name])[padding])


@for_each
def test_two_runs_are_bitwise_equal(implementation):
  arguments = _arguments()
  gradient = _gradient(implementation)
  _assert_equal(gradient(arguments), gradient(arguments))


@for_each
def test_vmap_and_remat_change_nothing(implementation):
  loss = functools.partial(_loss, implementation=implementation)
  stacked = [_arguments(seed=seed) for seed in (0, 1, 2)]
  expected = [_gradient(implementation)(one) for one in stacked]
  remat = jax.jit(jax.grad(jax.checkpoint(loss)))
  _assert_close(remat(stacked[0]), expected[0])
  batched = jax.tree.map(lambda *a: jnp.stack(a), *stacked)
  gradients = jax.jit(jax.vmap(jax.grad(loss)))(batched)
  for i, one in enumerate(expected):
    _assert_close(jax.tree.map(lambda g, i=i: g[i], gradients), one)


@for_each
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('wide', ['float32', 'bfloat16'])
def test_dtypes_of_results_and_cotangents(implementation, wide, dtype):
  arguments = _arguments(dtype)
  arguments |= {n: arguments[n].astype(wide) for n in ('g', 'bonus')}
  o, state = jax.eval_shape(_run(implementation), **arguments)
  assert (o.dtype, state.dtype) == (dtype, jnp.float32)
  gradients = jax.eval_shape(_gradient(implementation), arguments)
  for name, argument in arguments.items():
    assert gradients[name].dtype == argument.dtype
    assert gradients[name].shape == argument.shape


@for_each
def test_a_mesh_changes_nothing(implementation):
  arguments = _arguments()
  ids = jnp.asarray(testing.segments('mixed', SPEC.B, SPEC.T))
  loss = functools.partial(_loss, implementation=implementation)
  expected = jax.jit(jax.value_and_grad(loss))(arguments, ids)
  mesh = jax.make_mesh(
    (2, 2, 2),
    ('data', 'tensor', 'sequence'),
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  with jax.set_mesh(mesh):
    actual = jax.jit(jax.value_and_grad(loss))(arguments, ids)
  _assert_close(actual, expected)


@for_each
def test_the_normalizer_is_the_recurrence_of_a_value_of_one(implementation):
  problem = problems.make_problem(SPEC)
  given = {n: a for n, a in problem.arguments.items() if n != 'bonus'}
  normalizer = np.cos(np.arange(SPEC.B * SPEC.HV * SPEC.K))
  normalizer = normalizer.reshape(SPEC.B, SPEC.HV, SPEC.K)
  ids = testing.segments('padding_inside', SPEC.B, SPEC.T)
  o, state = problems.token_recurrence(given, segment_ids=ids)
  ones = {
    'v': np.ones((*given['v'].shape[:-1], 1)),
    'initial_state': normalizer[..., None],
  }
  z, n = problems.token_recurrence(given | ones, segment_ids=ids)
  arrays = {name: jnp.asarray(a, jnp.float32) for name, a in given.items()}
  first = arrays.pop('initial_state')
  actual = linear_attention_with_normalizer(
    **arrays,
    initial_state=(first, jnp.asarray(normalizer, jnp.float32)),
    segment_ids=jnp.asarray(ids),
    chunk_size=16,
    implementation=implementation,
  )
  _assert_close(actual, (o, z[..., 0], (state, n[..., 0])))
