"""Holds every implementation to the float64 definition of the op.

An implementation joins by its name in `api.LINEAR_ATTENTION`.
"""

import dataclasses

import pytest

from pallas_kernels.linear_attention import api
from pallas_kernels.linear_attention import arg_specs
from tests import testing
from tests.pallas_kernels.linear_attention import problems

IMPLEMENTATIONS = tuple(i.name for i in api.LINEAR_ATTENTION.implementations)
SPECS = {s.name.removeprefix('ci_'): s for s in arg_specs.with_tag('ci')}
# Several groups of chunks, and a last one that is not full.
CHUNK = 8
MODELS = [(name, 'float32') for name in SPECS]
MODELS += [('retnet', 'bfloat16'), ('rwkv6', 'bfloat16')]

for_each = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)


def _spec(name, **changes):
  return dataclasses.replace(SPECS[name], **changes)


@pytest.mark.parametrize(('name', 'dtype'), MODELS)
@pytest.mark.parametrize('decay', testing.DECAYS)
@for_each
def test_decays_of_models(implementation, decay, name, dtype):
  problems.check(implementation, _spec(name, dtype=dtype), decay, chunk=CHUNK)


@pytest.mark.parametrize('segments', testing.SEGMENTS)
@pytest.mark.parametrize('has_bonus', [False, True])
@pytest.mark.parametrize('gate', ['none', 'head', 'channel'])
@for_each
def test_segments(implementation, gate, has_bonus, segments):
  spec = _spec('linear', gate=gate, has_bonus=has_bonus)
  problems.check(implementation, spec, 'mixed', segments, chunk=CHUNK)


@pytest.mark.parametrize('name', ['mamba2', 'rwkv6'])
def test_a_key_and_value_of_one_number(name):
  spec = _spec(name, H=1, HV=2, K=1, V=1)
  problems.check('xla', spec, 'mixed', chunk=CHUNK)


@pytest.mark.parametrize('name', ['mamba2', 'rwkv6'])
def test_the_chunk_by_default_at_width_128(name):
  spec = _spec(name, B=1, T=150, H=1, HV=1, K=128, V=128)
  problems.check('xla', spec, 'mixed')


@pytest.mark.parametrize('chunk', [1, 5, 75, 1000])
def test_chunk_sizes(chunk):
  problems.check('xla', SPECS['mamba2'], 'mixed', chunk=chunk)


@pytest.mark.parametrize('length', [1, 2, 15, 16, 17, 31, 33, 64, 65, 129, 200])
def test_lengths(length):
  spec = _spec('mamba2', has_bonus=True, T=length)
  problems.check('xla', spec, 'mixed', chunk=CHUNK)


@pytest.mark.drill
@pytest.mark.parametrize('name', ['mamba2', 'rwkv6'])
@pytest.mark.parametrize('length', range(1, 201))
def test_every_length(length, name):
  problems.check('xla', _spec(name, T=length, K=4, V=4), 'mixed')
