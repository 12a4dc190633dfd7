"""Proves the oracle that the kernels are held against."""

import numpy as np
import pytest

from pallas_kernels.delta_rule import arg_specs
from tests import testing

TINY = arg_specs.ArgSpec(
  name='tiny', B=2, T=6, H=1, HV=2, K=3, V=2, dtype='float32'
)
STEP = 1e-6


def _loss(problem, arguments):
  o, state = testing.token_recurrence(
    arguments, segment_ids=problem.segment_ids
  )
  do, dstate = problem.cotangents
  return np.sum(o * do) + np.sum(state * dstate)


def _finite_difference(problem, name):
  arguments = {n: a.copy() for n, a in problem.arguments.items()}
  gradient = np.zeros_like(arguments[name])
  for index in np.ndindex(gradient.shape):
    center = arguments[name][index]
    losses = []
    for step in (STEP, -STEP):
      arguments[name][index] = center + step
      losses.append(_loss(problem, arguments))
    arguments[name][index] = center
    gradient[index] = (losses[0] - losses[1]) / (2 * STEP)
  return gradient


@pytest.mark.parametrize('segment_name', ['none', 'padding_inside', 'length_1'])
def test_gradients_of_the_oracle_are_those_of_finite_differences(segment_name):
  problem = testing.make_problem(TINY, 'random_beta_2', segment_name)
  if segment_name == 'padding_inside':
    ids = np.array([[5, 5, 0, 0, 5, 9], [0, 3, 3, 0, 4, 0]], np.int32)
    problem = problem._replace(segment_ids=ids)
  expected = testing.oracle(problem)
  for name in testing.DIFFERENTIABLE:
    actual = _finite_difference(problem, name)
    np.testing.assert_allclose(
      actual, expected[f'd{name}'], rtol=0, atol=1e-7, err_msg=name
    )


def test_one_write_is_the_outer_product():
  arguments = {
    'q': np.ones((1, 1, 1, 2)),
    'k': np.array([1.0, 2.0]).reshape(1, 1, 1, 2),
    'v': np.array([3.0]).reshape(1, 1, 1, 1),
    'beta': np.full((1, 1, 1), 0.5),
    'initial_state': np.array([1.0, 0.0]).reshape(1, 1, 2, 1),
  }
  o, state = testing.token_recurrence(arguments, scale=1.0)
  # S = (1, 0), its reading 1, the error 3 - 1, so S + (1, 2) * 0.5 * 2.
  np.testing.assert_array_equal(state[0, 0, :, 0], [2.0, 2.0])
  np.testing.assert_array_equal(o, [[[[4.0]]]])


def test_the_limits_are_the_tighter_of_both_rules():
  problem, expected, reference = testing.reference_results(
    TINY, 'random', 'none'
  )
  off = reference | {'o': expected['o'] * (1 + 1e-7)}
  assert 4e-7 < testing.limits(problem, expected, off)['o'] < 5e-7
  far = reference | {'o': expected['o'] * 2}
  assert testing.limits(problem, expected, far)['o'] == 1e-5


def test_no_limit_lets_what_is_no_number_pass():
  expected = np.ones(3)
  assert testing.error(np.array([1.0, np.nan, 1.0]), expected) == np.inf
