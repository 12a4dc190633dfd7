import dataclasses

import numpy as np
import pytest

from pallas_kernels.delta_rule import arg_specs
from tests import testing

SPECS = {spec.name: spec for spec in arg_specs.with_tag('ci')}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('gate', [None, 'head_random'])
def test_strengths_of_zero_and_next_to_it_have_their_gradient(gate, dtype):
  spec = dataclasses.replace(SPECS['ragged'], dtype=dtype)
  problem = testing.make_problem(spec, gate=gate)
  problem.arguments['beta'][:, ::3] = 0
  problem.arguments['beta'][:, 1::5] = 2.0**-80
  expected = testing.oracle(problem)
  reference = testing.evaluate(problem, 'recurrent')
  actual = testing.evaluate(problem, 'xla')
  allowed = testing.limits(problem, expected, reference)
  errors = {n: testing.error(actual[n], expected[n]) for n in problem.results}
  assert not {n: e for n, e in errors.items() if e > allowed[n]}


def test_strengths_of_zero_write_nothing():
  problem = testing.make_problem(SPECS['ragged'])
  problem.arguments['beta'][:] = 0
  problem.arguments['initial_state'][:] = 0
  assert not np.any(testing.evaluate(problem, 'xla')['final_state'])
