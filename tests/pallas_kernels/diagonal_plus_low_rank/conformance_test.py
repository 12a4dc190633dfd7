"""Holds every implementation to the float64 definition of the op.

An implementation joins by its name in `api.DIAGONAL_PLUS_LOW_RANK`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import diagonal_plus_low_rank
from pallas_kernels.diagonal_plus_low_rank import api
from pallas_kernels.diagonal_plus_low_rank import arg_specs
from tests import testing
from tests.pallas_kernels.diagonal_plus_low_rank import problems

IMPLEMENTATIONS = tuple(
  i.name for i in api.DIAGONAL_PLUS_LOW_RANK.implementations
)
SPECS = {spec.name: spec for spec in arg_specs.with_tag('ci')}
HARD = dataclasses.replace(SPECS['head_64'], T=70)
LENGTHS = (1, 2, 16, 17, 65, 200)  # All of them in drills.


def _check(
  implementation, spec, kind='rwkv7', segments='none', gate=None, chunk=None
):
  problem, expected, reference = problems.reference_results(
    spec, kind, segments, gate
  )
  actual = problems.evaluate(problem, implementation, chunk_size=chunk)
  broken = {}
  for name in problem.results:
    found = testing.error(actual[name], expected[name])
    allowed = problems.limit(spec.dtype, name, expected[name], reference[name])
    if not found <= allowed:
      broken[name] = (found, allowed)
  assert not broken


@pytest.mark.parametrize('name', SPECS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_shapes(implementation, name):
  _check(implementation, SPECS[name])


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', problems.KINDS)
def test_kinds_of_inputs(kind, dtype):
  _check('xla', dataclasses.replace(SPECS['head_64'], dtype=dtype), kind)


@pytest.mark.parametrize('gate', testing.GATES[1:])
def test_gates(gate):
  _check('xla', HARD, gate=gate)


@pytest.mark.parametrize('gate', ['head_mixed', 'channel_mixed'])
@pytest.mark.parametrize('kind', problems.KINDS)
def test_gates_of_kinds(kind, gate):
  _check('xla', HARD, kind, gate=gate)


@pytest.mark.parametrize('gate', testing.GATES[1:])
def test_gates_of_16_bit(gate):
  spec = dataclasses.replace(SPECS['grouped'], dtype='bfloat16')
  _check('xla', spec, gate=gate)


@pytest.mark.parametrize('gate', [None, 'channel_mixed'])
@pytest.mark.parametrize('segments', testing.SEGMENTS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_segments(implementation, segments, gate):
  _check(implementation, SPECS['ragged'], 'rwkv7', segments, gate)


@pytest.mark.parametrize('chunk', [1, 5, 1000])
def test_chunk_sizes(chunk):
  gate = 'head_mixed'
  _check('xla', SPECS['ragged'], 'rwkv7', 'padding_inside', gate, chunk)


@pytest.mark.parametrize('length', LENGTHS)
def test_lengths(length):
  _check('xla', dataclasses.replace(SPECS['one_token'], T=length), chunk=16)


@pytest.mark.drill
@pytest.mark.parametrize('length', range(1, 201))
def test_every_length(length):
  _check('xla', dataclasses.replace(SPECS['one_token'], T=length), chunk=16)


def test_gradients_of_the_definition_are_finite_differences():
  spec = arg_specs.ArgSpec(name='slopes', B=1, T=12, H=1, HV=2, K=5, V=4)
  spec = dataclasses.replace(spec, dtype='float64')
  problem = problems.make_problem(spec, 'unrelated', gate='channel_random')
  do, dstate = problem.cotangents

  def loss(name, shift):
    arguments = dict(problem.arguments)
    arguments[name] = arguments[name] + shift
    o, state = problems.token_recurrence(arguments)
    return np.sum(o * do) + np.sum(state * dstate)

  with jax.enable_x64(True):
    _, pullback = jax.vjp(
      lambda arrays: diagonal_plus_low_rank(
        **arrays, implementation='recurrent'
      ),
      {n: jnp.asarray(x) for n, x in problem.arguments.items()},
    )
    (gradients,) = pullback((jnp.asarray(do), jnp.asarray(dstate)))
  rng, step = np.random.default_rng(2), 1e-6
  for name, gradient in gradients.items():
    direction = rng.standard_normal(gradient.shape)
    difference = loss(name, step * direction) - loss(name, -step * direction)
    slope = np.sum(np.asarray(gradient) * direction)
    np.testing.assert_allclose(slope, difference / (2 * step), rtol=1e-6)
