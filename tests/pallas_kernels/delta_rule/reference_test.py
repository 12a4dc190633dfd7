"""The gates of the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import delta_rule
from pallas_kernels.delta_rule import arg_specs
from tests import testing

SPEC = arg_specs.ArgSpec(name='gated', B=2, T=30, H=1, HV=2, K=5, V=4)


def _gate(kind, rng):
  per_channel = (SPEC.B, SPEC.T, SPEC.HV, SPEC.K)
  return {
    'per_head': -rng.exponential(0.2, per_channel[:-1]),
    'per_channel': -rng.exponential(0.2, per_channel),
    'zero': np.zeros(per_channel[:-1]),
    'closed': np.full(per_channel, -20.0),
  }[kind].astype(np.float32)


@pytest.mark.parametrize('segments', ['none', 'padding_inside'])
@pytest.mark.parametrize('kind', ['per_head', 'per_channel', 'zero', 'closed'])
def test_gates(kind, segments):
  problem = testing.make_problem(SPEC, 'random', segments)
  g = _gate(kind, np.random.default_rng(1))
  ids = problem.segment_ids
  *arrays, initial_state = testing.as_arrays(problem, 'float32')
  o, state = delta_rule(
    *arrays,
    jnp.asarray(g),
    initial_state=initial_state,
    segment_ids=None if ids is None else jnp.asarray(ids),
    implementation='recurrent',
  )
  expected = testing.token_recurrence(
    problem.arguments | {'g': np.float64(g)}, segment_ids=ids
  )
  for actual, reference in zip((o, state), expected, strict=True):
    assert testing.error(np.float64(actual), reference) < 1e-6


def test_gradient_of_the_gate_is_that_of_finite_differences():
  problem = testing.make_problem(SPEC)
  g = np.float64(_gate('per_channel', np.random.default_rng(1)))

  def loss(g):
    o, state = testing.token_recurrence(problem.arguments | {'g': g})
    do, dstate = problem.cotangents
    return np.sum(o * do) + np.sum(state * dstate)

  direction = np.random.default_rng(2).standard_normal(g.shape)
  step = 1e-6
  expected = loss(g + step * direction) - loss(g - step * direction)
  with jax.enable_x64(True):
    *arrays, state = testing.as_arrays(problem, 'float64')

    def run(g):
      return delta_rule(
        *arrays, g, initial_state=state, implementation='recurrent'
      )

    _, pullback = jax.vjp(run, jnp.asarray(g))
    (gradient,) = pullback(tuple(map(jnp.asarray, problem.cotangents)))
  actual = np.sum(np.asarray(gradient) * direction)
  np.testing.assert_allclose(actual, expected / (2 * step), rtol=1e-7)
