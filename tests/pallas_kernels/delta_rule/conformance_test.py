"""Holds every implementation to the float64 definition of the op.

An implementation joins by its name in `api.DELTA_RULE`.
"""

import dataclasses

import pytest

from pallas_kernels.delta_rule import api
from pallas_kernels.delta_rule import arg_specs
from tests import testing

IMPLEMENTATIONS = tuple(
  name for name, reason in api.DELTA_RULE.explain() if reason is None
)
SPECS = {spec.name: spec for spec in arg_specs.with_tag('ci')}
LENGTHS = (1, 2, 16, 17, 65, 200)  # All of them in drills.


def _check(
  implementation, spec, kind='random', segments='none', gate=None, chunk=None
):
  problem, expected, reference = testing.reference_results(
    spec, kind, segments, gate
  )
  actual = testing.evaluate(problem, implementation, chunk_size=chunk)
  allowed = testing.limits(problem, expected, reference)
  errors = {n: testing.error(actual[n], expected[n]) for n in problem.results}
  broken = {n: (e, allowed[n]) for n, e in errors.items() if e > allowed[n]}
  assert not broken


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', SPECS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_shapes(implementation, name, dtype):
  _check(implementation, dataclasses.replace(SPECS[name], dtype=dtype))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('gate', testing.GATES[1:])
@pytest.mark.parametrize('name', ['narrow', 'grouped', 'ragged'])
def test_gates(name, gate, dtype):
  spec = dataclasses.replace(SPECS[name], dtype=dtype)
  _check('xla', spec, 'random_beta_2', gate=gate)


@pytest.mark.parametrize('gate', ['head_mixed', 'channel_mixed'])
@pytest.mark.parametrize('kind', testing.KINDS)
def test_gates_of_hard_keys(kind, gate):
  _check('xla', dataclasses.replace(SPECS['head_64'], T=70), kind, gate=gate)


@pytest.mark.parametrize('gate', ['head_mixed', 'channel_mixed'])
@pytest.mark.parametrize('segments', testing.SEGMENTS)
def test_gates_and_segments(segments, gate):
  _check('xla', SPECS['ragged'], 'random', segments, gate)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', testing.KINDS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_kinds_of_inputs(implementation, kind, dtype):
  _check(
    implementation, dataclasses.replace(SPECS['head_64'], dtype=dtype), kind
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', ['random', 'cos_0.9_beta_1'])
@pytest.mark.parametrize('segments', testing.SEGMENTS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_segments(implementation, segments, kind, dtype):
  spec = dataclasses.replace(SPECS['grouped'], T=75, dtype=dtype)
  _check(implementation, spec, kind, segments)


@pytest.mark.parametrize('chunk', [1, 5, 64, 1000])
@pytest.mark.parametrize('segments', ['none', 'padding_inside'])
def test_chunk_sizes(segments, chunk):
  _check('xla', SPECS['ragged'], 'random', segments, chunk=chunk)


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_lengths(implementation, length):
  _check(implementation, dataclasses.replace(SPECS['one_token'], T=length))


@pytest.mark.drill
@pytest.mark.parametrize('length', range(1, 201))
def test_every_length(length):
  _check('xla', dataclasses.replace(SPECS['one_token'], T=length))


@pytest.mark.drill
@pytest.mark.parametrize('kind', testing.KINDS)
def test_kinds_of_inputs_at_width_128(kind):
  _check('xla', dataclasses.replace(SPECS['head_128'], T=150), kind)
