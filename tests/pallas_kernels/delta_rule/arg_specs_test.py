import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels import delta_rule
from pallas_kernels.delta_rule import arg_specs


def test_names_are_unique_and_every_tag_is_used():
  names = [spec.name for spec in arg_specs.SPECS]
  assert len(set(names)) == len(names)
  for tag in arg_specs.TAGS:
    assert arg_specs.with_tag(tag)


@pytest.mark.parametrize('spec', arg_specs.SPECS, ids=lambda s: s.name)
def test_the_op_takes_every_spec(spec):
  arguments = spec.arguments()
  o, state = jax.eval_shape(lambda a: delta_rule(**a), arguments)
  assert (o.shape, o.dtype) == (arguments['v'].shape, spec.dtype)
  assert state.shape == (spec.B, spec.HV, spec.K, spec.V)


def test_random_arguments_fit_their_spec():
  spec = arg_specs.ArgSpec(
    name='x', B=2, T=3, H=2, HV=4, K=5, V=6, dtype='bfloat16'
  )
  arrays = arg_specs.random_arguments(spec, seed=1)
  for name, expected in spec.arguments().items():
    assert (arrays[name].shape, arrays[name].dtype) == (
      expected.shape,
      expected.dtype,
    )
  spec = dataclasses.replace(spec, dtype='float32')
  k = arg_specs.random_arguments(spec, seed=1)['k']
  np.testing.assert_allclose(np.linalg.norm(k, axis=-1), 1, rtol=1e-6)
  other = arg_specs.random_arguments(spec, seed=2)['k']
  assert not np.array_equal(k, other)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'T': 0}, 'T of ragged must be >= 1, got 0'),
    ({'HV': 3}, 'a multiple of H, got HV=3 and H=2'),
    ({'tags': ('quick',)}, r"must be among .*, got \['quick'\]"),
  ],
)
def test_a_wrong_spec_is_refused(change, message):
  (spec,) = (s for s in arg_specs.SPECS if s.name == 'ragged')
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(spec, **change)


def test_an_unknown_tag_is_refused():
  with pytest.raises(ValueError, match="got 'quick'"):
    arg_specs.with_tag('quick')
