import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels import diagonal_plus_low_rank
from pallas_kernels.diagonal_plus_low_rank import arg_specs


def test_names_are_unique_and_every_tag_is_used():
  names = [spec.name for spec in arg_specs.SPECS]
  assert len(set(names)) == len(names)
  for tag in arg_specs.TAGS:
    assert arg_specs.with_tag(tag)


@pytest.mark.parametrize('spec', arg_specs.SPECS, ids=lambda s: s.name)
def test_the_op_takes_every_spec(spec):
  arguments = spec.arguments()
  o, state = jax.eval_shape(lambda a: diagonal_plus_low_rank(**a), arguments)
  assert (o.shape, o.dtype) == (arguments['v'].shape, spec.dtype)
  assert state.shape == (spec.B, spec.HV, spec.K, spec.V)


def test_random_arguments_fit_their_spec():
  spec = arg_specs.ArgSpec(name='x', B=2, T=3, H=2, HV=4, K=5, V=6)
  narrow = dataclasses.replace(spec, dtype='bfloat16')
  for one in (spec, narrow):
    arrays = arg_specs.random_arguments(one, seed=1)
    for name, expected in one.arguments().items():
      assert arrays[name].shape == expected.shape
      assert arrays[name].dtype == expected.dtype
  arrays = arg_specs.random_arguments(spec, seed=1)
  b, rate = arrays['b'], np.asarray(-arrays['a'] / arrays['b'])
  np.testing.assert_allclose(np.linalg.norm(b, axis=-1), 1, rtol=1e-6)
  assert np.all((rate > 0) & (rate < 1))
  assert np.all((arrays['g'] < 0) & (arrays['g'] > -np.exp(-0.5)))
  other = arg_specs.random_arguments(spec, seed=2)
  assert not np.array_equal(b, other['b'])


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
