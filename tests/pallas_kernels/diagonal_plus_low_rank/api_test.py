import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import diagonal_plus_low_rank
from pallas_kernels import diagonal_plus_low_rank_step
from pallas_kernels.diagonal_plus_low_rank import api
from pallas_kernels.diagonal_plus_low_rank import arg_specs
from tests import testing

SPEC = arg_specs.ArgSpec(name='api', B=2, T=5, H=2, HV=4, K=8, V=6)
STATE = (2, 4, 8, 6)

REFUSED = {
  'rank': (
    {'b': jnp.zeros((2, 5, 8))},
    'b must have the 4 axes [B, T, H, K], got shape (2, 5, 8)',
  ),
  'time': (
    {'a': jnp.zeros((2, 6, 2, 8))},
    'axis T of a must be 5 as in q, got 6',
  ),
  'value heads of a': (
    {'a': jnp.zeros((2, 5, 4, 8))},
    'axis H of a must be 2 as in q, got 4',
  ),
  'value heads': (
    {'v': jnp.zeros((2, 5, 3, 6)), 'g': None},
    'must be a multiple of the key heads H, got HV=3 and H=2',
  ),
  'mixed dtypes': (
    {'b': jnp.zeros((2, 5, 2, 8), jnp.bfloat16)},
    'q, k, v, a, b must share one dtype of float32, bfloat16, float64, got '
    'float32, float32, float32, float32, bfloat16',
  ),
  'gate heads': (
    {'g': jnp.zeros((2, 5, 2))},
    'axis HV of g must be 4 as in v, got 2',
  ),
  'gate channels': (
    {'g': jnp.zeros((2, 5, 4, 1))},
    'axis K of g must be 8 as in q, got 1',
  ),
  'gate dtype': (
    {'g': jnp.zeros((2, 5, 4), jnp.int32)},
    'g must be of a float dtype, got int32',
  ),
  'state': (
    {'initial_state': jnp.zeros((2, 4, 6, 8))},
    'initial_state must be float32 of shape [B, HV, K, V] = (2, 4, 8, 6), '
    'got float32 of shape (2, 4, 6, 8)',
  ),
  'segments': (
    {'segment_ids': jnp.ones((2, 5))},
    'segment_ids must be',
  ),
  'chunk': ({'chunk_size': 0}, 'chunk_size must be at least 1, got 0'),
  'name': (
    {'implementation': 'fast'},
    'implementation of diagonal_plus_low_rank must be one of xla, recurrent, '
    "got 'fast'",
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_wrong_arguments_are_refused(case):
  changes, message = REFUSED[case]
  with pytest.raises(ValueError, match=re.escape(message)):
    diagonal_plus_low_rank(**arg_specs.random_arguments(SPEC) | changes)


def test_an_empty_sequence_is_refused():
  arguments = {n: x[:, :0] for n, x in arg_specs.random_arguments(SPEC).items()}
  with pytest.raises(ValueError, match='T must be at least 1, got'):
    diagonal_plus_low_rank(**arguments)


STEP_REFUSED = {
  'rank': (
    {'a': jnp.zeros((2, 1, 2, 8))},
    'a must have the 3 axes [B, H, K], got shape (2, 1, 2, 8)',
  ),
  'value heads': (
    {'v': jnp.zeros((2, 3, 6)), 'g': None},
    'got HV=3 and H=2',
  ),
  'state': (
    {'state': jnp.zeros(STATE, jnp.bfloat16)},
    'state must be float32 of shape [B, HV, K, V] = (2, 4, 8, 6), got bfloat16',
  ),
}


@pytest.mark.parametrize('case', STEP_REFUSED)
def test_wrong_arguments_of_a_step_are_refused(case):
  changes, message = STEP_REFUSED[case]
  token = {n: x[:, 0] for n, x in arg_specs.random_arguments(SPEC).items()}
  with pytest.raises(ValueError, match=re.escape(message)):
    diagonal_plus_low_rank_step(**token | {'state': jnp.zeros(STATE)} | changes)


@pytest.mark.parametrize(
  ('gate', 'scale'), [('none', None), ('head', 0.5), ('channel', None)]
)
def test_steps_are_the_op_token_by_token(gate, scale):
  arguments = arg_specs.random_arguments(SPEC)
  g = arguments['g']
  arguments['g'] = {'none': None, 'head': g[..., 0], 'channel': g}[gate]
  o, final = diagonal_plus_low_rank(**arguments, scale=scale)
  state = jnp.zeros(STATE)
  for t in range(SPEC.T):
    token = jax.tree.map(lambda x, t=t: x[:, t], arguments)
    o_t, state = diagonal_plus_low_rank_step(**token, state=state, scale=scale)
    assert testing.error(np.float64(o_t), np.float64(o[:, t])) < 1e-6
  assert testing.error(np.float64(state), np.float64(final)) < 1e-6


def test_xla_declines_float64():
  with jax.enable_x64(True):
    arguments = {
      n: x.astype('float64')
      for n, x in arg_specs.random_arguments(SPEC).items()
    }
    with pytest.raises(NotImplementedError, match='computes in float32'):
      diagonal_plus_low_rank(**arguments, implementation='xla')
    o, state = diagonal_plus_low_rank(**arguments)
  assert (o.dtype, state.dtype) == ('float64', 'float64')


def test_xla_is_the_default():
  assert api.DIAGONAL_PLUS_LOW_RANK.explain() == [
    ('xla', None),
    ('recurrent', None),
  ]


def test_zero_is_the_default_initial_state():
  arguments = arg_specs.random_arguments(SPEC)
  expected = diagonal_plus_low_rank(**arguments, initial_state=jnp.zeros(STATE))
  for actual, e in zip(
    diagonal_plus_low_rank(**arguments), expected, strict=True
  ):
    np.testing.assert_array_equal(actual, e)
