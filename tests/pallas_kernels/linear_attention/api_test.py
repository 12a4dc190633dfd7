import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear_attention
from pallas_kernels import linear_attention_step
from pallas_kernels import linear_attention_with_normalizer
from pallas_kernels.linear_attention import api
from pallas_kernels.linear_attention import arg_specs
from tests import testing

SPEC = arg_specs.ArgSpec(name='api', B=2, T=5, H=2, HV=4, K=8, V=6)
STATE = (2, 4, 8, 6)
GATES = {'none': None, 'constant': (4,), 'head': (2, 5, 4)}
GATES['channel'] = (2, 5, 4, 8)


def _arguments(**changes):
  return arg_specs.random_arguments(SPEC) | changes


REFUSED = {
  'rank': (
    {'q': jnp.zeros((2, 5, 8))},
    'q must have the 4 axes [B, T, H, K], got shape (2, 5, 8)',
  ),
  'time': (
    {'k': jnp.zeros((2, 6, 2, 8))},
    'axis T of k must be 5 as in q, got 6',
  ),
  'no time': (
    {n: jnp.zeros((2, 0, h, d)) for n, h, d in (('q', 2, 8), ('k', 2, 8))}
    | {'v': jnp.zeros((2, 0, 4, 6))},
    'T must be at least 1, got 0',
  ),
  'value heads': (
    {'v': jnp.zeros((2, 5, 3, 6))},
    'must be a multiple of the key heads H, got HV=3 and H=2',
  ),
  'mixed dtypes': (
    {'k': jnp.zeros((2, 5, 2, 8), jnp.bfloat16)},
    'q, k, v must share one dtype of float32, bfloat16, float64, got float32, '
    'bfloat16, float32',
  ),
  'half': (
    {n: jnp.zeros(SPEC.arguments()[n].shape, jnp.float16) for n in 'qkv'},
    'float64, got float16, float16, float16',
  ),
  'constant gate': (
    {'g': jnp.zeros(2)},
    'axis HV of g must be 4 as in v, got 2',
  ),
  'gate axes': (
    {'g': jnp.zeros((2, 5))},
    'g must have the 3 axes [B, T, HV], got shape (2, 5)',
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
  'bonus': (
    {'bonus': jnp.zeros((2, 8))},
    'axis HV of bonus must be 4 as in v, got 2',
  ),
  'bonus dtype': (
    {'bonus': jnp.zeros((4, 8), jnp.int32)},
    'bonus must be of a float dtype, got int32',
  ),
  'state': (
    {'initial_state': jnp.zeros((2, 4, 6, 8))},
    'initial_state must be float32 of shape [B, HV, K, V] = (2, 4, 8, 6), '
    'got float32 of shape (2, 4, 6, 8)',
  ),
  'state dtype': (
    {'initial_state': jnp.zeros(STATE, jnp.bfloat16)},
    'got bfloat16 of shape (2, 4, 8, 6)',
  ),
  'segment shape': (
    {'segment_ids': jnp.ones((2, 4), jnp.int32)},
    'segment_ids must be integers of shape [B, T] = (2, 5), got int32 of '
    'shape (2, 4)',
  ),
  'segment dtype': ({'segment_ids': jnp.ones((2, 5))}, 'got float32 of shape'),
  'chunk': ({'chunk_size': 0}, 'chunk_size must be at least 1, got 0'),
  'name': (
    {'implementation': 'fast'},
    'implementation of linear_attention must be one of xla, recurrent, got '
    "'fast'",
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_wrong_arguments_are_refused(case):
  changes, message = REFUSED[case]
  with pytest.raises(ValueError, match=re.escape(message)):
    linear_attention(**_arguments(**changes))


STEP_REFUSED = {
  'rank': ({'q': jnp.zeros((2, 1, 2, 8))}, 'q must have the 3 axes [B, H, K]'),
  'value heads': ({'v': jnp.zeros((2, 3, 6))}, 'got HV=3 and H=2'),
  'gate': ({'g': jnp.zeros((2, 2))}, 'axis HV of g must be 4 as in v, got 2'),
  'state': ({'state': jnp.zeros((2, 4, 8, 5))}, 'state must be float32'),
  'dtype': ({'v': jnp.zeros((2, 4, 6), jnp.bfloat16)}, 'must share one dtype'),
}


@pytest.mark.parametrize('case', STEP_REFUSED)
def test_wrong_arguments_of_a_step_are_refused(case):
  changes, message = STEP_REFUSED[case]
  token = {name: a[:, 0] for name, a in _arguments().items()}
  with pytest.raises(ValueError, match=re.escape(message)):
    linear_attention_step(**token | {'state': jnp.zeros(STATE)} | changes)


@pytest.mark.parametrize('has_bonus', [False, True])
@pytest.mark.parametrize('gate', GATES)
def test_steps_are_the_op_token_by_token(gate, has_bonus):
  rng = np.random.default_rng(0)
  arguments, constant = _arguments(), {}
  if gate != 'none':
    g = -jnp.asarray(rng.exponential(0.1, GATES[gate]), jnp.float32)
    (constant if gate == 'constant' else arguments)['g'] = g
  if has_bonus:
    constant['bonus'] = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
  constant['scale'] = 0.5
  o, final = linear_attention(**arguments, **constant)
  state = jnp.zeros(STATE)
  for t in range(SPEC.T):
    token = {n: a[:, t] for n, a in arguments.items()}
    o_t, state = linear_attention_step(**token, **constant, state=state)
    assert testing.error(np.float64(o_t), np.float64(o[:, t])) < 1e-6
  assert testing.error(np.float64(state), np.float64(final)) < 1e-6


def test_the_scale_by_default():
  arguments = _arguments()
  expected, _ = linear_attention(**arguments, scale=8**-0.5)
  np.testing.assert_array_equal(linear_attention(**arguments)[0], expected)
  token = {name: a[:, 0] for name, a in arguments.items()}
  o, _ = linear_attention_step(**token, state=jnp.zeros(STATE))
  np.testing.assert_allclose(o, expected[:, 0], rtol=1e-5)


def test_a_normalizer_of_another_shape_is_refused():
  first = jnp.zeros(STATE), jnp.zeros((2, 4, 6))
  message = 'axis K of normalizer must be 8 as in initial_state, got 6'
  with pytest.raises(ValueError, match=re.escape(message)):
    linear_attention_with_normalizer(**_arguments(), initial_state=first)


def test_xla_declines_float64():
  with jax.enable_x64(True):
    arguments = {n: a.astype('float64') for n, a in _arguments().items()}
    with pytest.raises(NotImplementedError, match='computes in float32'):
      linear_attention(**arguments, implementation='xla')
    o, state = linear_attention(**arguments)
  assert (o.dtype, state.dtype) == ('float64', 'float64')


def test_xla_is_the_default():
  assert api.LINEAR_ATTENTION.candidates(None)[0].name == 'xla'
