"""Holds the delta product to the float64 definition of the delta rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import delta_product
from pallas_kernels import delta_product_step
from pallas_kernels import delta_rule
from pallas_kernels.delta_rule import arg_specs
from pallas_kernels.delta_rule import product_api
from tests import testing

IMPLEMENTATIONS = tuple(
  i.name for i in product_api.DELTA_PRODUCT.implementations
)
SPEC = arg_specs.ArgSpec(name='product', B=2, T=90, H=1, HV=2, K=16, V=8)
PER_TOKEN = ('k', 'v', 'beta')


def _tokens(problem, n):
  """Returns the problem of T / n tokens with n keys each."""

  def regroup(name, x):
    if name in PER_TOKEN:
      return x.reshape(x.shape[0], -1, n, *x.shape[2:])
    return x[:, n - 1 :: n] if name in ('q', 'g') else x

  ids, (do, dstate) = problem.segment_ids, problem.cotangents
  return problem._replace(
    arguments={n_: regroup(n_, a) for n_, a in problem.arguments.items()},
    segment_ids=None if ids is None else ids[:, ::n],
    cotangents=(do[:, n - 1 :: n], dstate),
  )


def _oracle(problem, n):
  """Returns the values, from the delta rule with n T tokens in float64."""
  arguments = dict(problem.arguments)
  for name in PER_TOKEN:
    x = arguments[name]
    arguments[name] = x.reshape(x.shape[0], -1, *x.shape[3:])
  for name, at in (('q', n - 1), ('g', 0)):
    if name in arguments:
      x = arguments[name]
      wide = np.zeros((x.shape[0], x.shape[1] * n, *x.shape[2:]))
      wide[:, at::n] = x
      arguments[name] = wide
  ids = problem.segment_ids
  ids = None if ids is None else np.repeat(ids, n, axis=1)
  o, state = testing.token_recurrence(arguments, segment_ids=ids)
  return {'o': o[:, n - 1 :: n], 'final_state': state}


@functools.cache
def _compiled(implementation):
  def compute(arguments, segment_ids, cotangents):
    run = functools.partial(
      delta_product, segment_ids=segment_ids, implementation=implementation
    )
    (o, state), pullback = jax.vjp(lambda a: run(**a), arguments)
    (gradients,) = pullback(cotangents)
    named = {f'd{name}': d for name, d in gradients.items()}
    return {'o': o, 'final_state': state, **named}

  return jax.jit(compute)


def _evaluate(problem, implementation, dtype):
  names = (*problem.arguments, 'o', 'initial_state')
  arrays = [*problem.arguments.values(), *problem.cotangents]
  wide = ('initial_state', 'g')
  arrays = [
    jnp.asarray(
      a, 'float32' if n in wide and dtype == 'bfloat16' else jnp.dtype(dtype)
    )
    for n, a in zip(names, arrays, strict=True)
  ]
  ids = problem.segment_ids
  results = _compiled(implementation)(
    dict(zip(problem.arguments, arrays[:-2], strict=True)),
    None if ids is None else jnp.asarray(ids),
    tuple(arrays[-2:]),
  )
  return {n: np.asarray(x).astype(np.float64) for n, x in results.items()}


def _check(
  implementation,
  n,
  *,
  kind='random',
  segments='none',
  gate=None,
  dtype='float32',
  length=SPEC.T,
):
  spec = dataclasses.replace(SPEC, T=length, dtype=dtype)
  problem = testing.make_problem(spec, kind, segments, gate=gate)
  problem = _tokens(problem, n)
  with jax.enable_x64(True):
    expected = _evaluate(problem, 'recurrent', 'float64')
  expected |= _oracle(problem, n)
  reference = _evaluate(problem, 'recurrent', dtype)
  actual = _evaluate(problem, implementation, dtype)
  allowed = testing.limits(problem, expected, reference)
  errors = {n: testing.error(actual[n], expected[n]) for n in allowed}
  assert not {n: e for n, e in errors.items() if e > allowed[n]}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('gate', [None, 'head_random', 'head_mixed'])
@pytest.mark.parametrize('n', [1, 2, 3, 5])
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_shapes_and_gates(implementation, n, gate, dtype):
  _check(implementation, n, gate=gate, dtype=dtype)


@pytest.mark.parametrize('kind', testing.KINDS)
def test_kinds_of_inputs(kind):
  _check('xla', 2, kind=kind)


@pytest.mark.parametrize('segments', testing.SEGMENTS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_segments(implementation, segments):
  _check(implementation, 3, segments=segments, gate='head_random')


@pytest.mark.drill
@pytest.mark.parametrize('length', range(1, 201))
def test_every_length(length):
  _check('xla', 2, gate='head_mixed', length=2 * length)


def _arguments(n=2, gate=None):
  problem = _tokens(testing.make_problem(SPEC, gate=gate), n)
  return {k: jnp.float32(a) for k, a in problem.arguments.items()}


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_one_key_per_token_is_the_delta_rule(implementation):
  arguments = _arguments(n=1, gate='head_random')
  o, state = delta_product(**arguments, implementation=implementation)
  for name in PER_TOKEN:
    arguments[name] = arguments[name][:, :, 0]
  expected = delta_rule(**arguments, implementation=implementation)
  for a, e in zip((o, state), expected, strict=True):
    np.testing.assert_array_equal(a, e)


def test_steps_are_the_op_token_by_token():
  arguments = _arguments(n=3, gate='channel_random')
  arguments['k'] = 2 * arguments['k']
  expected, final = delta_product(**arguments, normalize_qk=True)
  state = arguments.pop('initial_state')
  for t in range(expected.shape[1]):
    token = {name: a[:, t] for name, a in arguments.items()}
    o, state = delta_product_step(**token, state=state, normalize_qk=True)
    assert testing.error(np.float64(o), np.float64(expected[:, t])) < 1e-6
  assert testing.error(np.float64(state), np.float64(final)) < 1e-6


def test_xla_declines_decays_per_channel():
  arguments = _arguments(gate='channel_random')
  with pytest.raises(NotImplementedError, match='no decay per channel'):
    delta_product(**arguments, implementation='xla')


def test_wrong_arguments_are_refused():
  arguments = _arguments()
  with pytest.raises(ValueError, match='axis N of v must be 2 as in k, got 1'):
    delta_product(**arguments | {'v': arguments['v'][:, :, :1]})
  none = {n: arguments[n][:, :, :0] for n in PER_TOKEN}
  with pytest.raises(ValueError, match='N must be at least 1'):
    delta_product(**arguments | none)
