"""The gradients of the definition, which every implementation is held to."""

import jax
import numpy as np
import pytest

from pallas_kernels.linear_attention import arg_specs
from tests import testing
from tests.pallas_kernels.linear_attention import problems

SPECS = {
  gate: arg_specs.ArgSpec(
    name=gate, B=2, T=13, H=1, HV=2, K=3, V=2, gate=gate, has_bonus=has_bonus
  )
  for gate, has_bonus in (('constant', False), ('channel', True))
}


def _loss(problem, changed):
  o, state = problems.token_recurrence(
    problem.arguments | changed, segment_ids=problem.segment_ids
  )
  do, dstate = problem.cotangents
  return np.sum(o * do) + np.sum(state * dstate)


@pytest.mark.parametrize('segments', ['none', 'padding_inside'])
@pytest.mark.parametrize('gate', SPECS)
def test_gradients_are_those_of_finite_differences(gate, segments):
  problem = problems.make_problem(SPECS[gate], segment_name=segments)
  with jax.enable_x64(True):
    gradients = problems.evaluate(problem, 'recurrent', 'float64')
  rng = np.random.default_rng(1)
  for name, array in problem.arguments.items():
    direction = rng.standard_normal(array.shape)
    up, down = (
      _loss(problem, {name: array + step * direction}) for step in (1e-6, -1e-6)
    )
    actual = np.sum(gradients[f'd{name}'] * direction)
    np.testing.assert_allclose(actual, (up - down) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize('gate', SPECS)
def test_values_are_those_of_the_token_recurrence(gate):
  problem = problems.make_problem(SPECS[gate], 'mixed', 'padding_inside')
  actual = problems.evaluate(problem, 'recurrent')
  o, state = problems.token_recurrence(
    problem.arguments, segment_ids=problem.segment_ids
  )
  assert testing.error(actual['o'], o) < 1e-6
  assert testing.error(actual['final_state'], state) < 1e-6
