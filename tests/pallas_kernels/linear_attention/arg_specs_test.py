import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels import linear_attention
from pallas_kernels.linear_attention import arg_specs


def test_names_are_unique_and_every_tag_is_used():
  names = [spec.name for spec in arg_specs.SPECS]
  assert len(set(names)) == len(names)
  for tag in arg_specs.TAGS:
    assert arg_specs.with_tag(tag)


@pytest.mark.parametrize('spec', arg_specs.SPECS, ids=lambda s: s.name)
def test_the_op_takes_every_spec(spec):
  arguments = spec.arguments()
  o, state = jax.eval_shape(lambda a: linear_attention(**a), arguments)
  assert (o.shape, o.dtype) == (arguments['v'].shape, spec.dtype)
  assert state.shape == (spec.B, spec.HV, spec.K, spec.V)


@pytest.mark.parametrize('gate', arg_specs.GATES)
def test_random_arguments_fit_their_spec(gate):
  spec = arg_specs.ArgSpec(
    name='x', B=2, T=3, H=2, HV=4, K=5, V=6, gate=gate, has_bonus=True
  )
  arrays = arg_specs.random_arguments(spec, seed=1)
  axes = {'constant': (4,), 'head': (2, 3, 4), 'channel': (2, 3, 4, 5)}
  assert ('g' in arrays) == (gate in axes)
  if 'g' in arrays:
    assert arrays['g'].shape == axes[gate]
    assert np.all(arrays['g'] < 0)
  assert arrays['bonus'].shape == (4, 5)
  other = arg_specs.random_arguments(spec, seed=2)
  assert not np.array_equal(arrays['k'], other['k'])
  norms = np.linalg.norm(arrays['k'], axis=-1)
  np.testing.assert_allclose(norms, 1, rtol=1e-6)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'T': 0}, 'T of ci_gla must be >= 1, got 0'),
    ({'HV': 3}, 'a multiple of H, got HV=3 and H=2'),
    ({'gate': 'soft'}, "gate of ci_gla must be one of .*, got 'soft'"),
    ({'tags': ('quick',)}, r"must be among .*, got \['quick'\]"),
  ],
)
def test_a_wrong_spec_is_refused(change, message):
  (spec,) = (s for s in arg_specs.SPECS if s.name == 'ci_gla')
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(spec, **change)


def test_an_unknown_tag_is_refused():
  with pytest.raises(ValueError, match="got 'quick'"):
    arg_specs.with_tag('quick')
