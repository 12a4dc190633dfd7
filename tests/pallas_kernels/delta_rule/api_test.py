import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import delta_rule
from pallas_kernels import delta_rule_step
from pallas_kernels import dispatch
from pallas_kernels.delta_rule import api
from pallas_kernels.delta_rule import arg_specs
from tests import testing

SPEC = arg_specs.ArgSpec(name='api', B=2, T=5, H=2, HV=4, K=8, V=6)
STATE = (2, 4, 8, 6)


def _arguments(**changes):
  return arg_specs.random_arguments(SPEC) | changes


def _token(arguments):
  return {name: a[:, 0] for name, a in arguments.items()}


REFUSED = {
  'rank': (
    {'q': jnp.zeros((2, 5, 8))},
    'q must have the 4 axes [B, T, H, K], got shape (2, 5, 8)',
  ),
  'time': (
    {'k': jnp.zeros((2, 6, 2, 8))},
    'axis T of k must be 5 as in q, got 6',
  ),
  'value heads': (
    {'v': jnp.zeros((2, 5, 3, 6)), 'beta': jnp.zeros((2, 5, 3))},
    'must be a multiple of the key heads H, got HV=3 and H=2',
  ),
  'beta': (
    {'beta': jnp.zeros((2, 5, 2))},
    'axis HV of beta must be 4 as in v, got 2',
  ),
  'beta dtype': (
    {'beta': jnp.zeros((2, 5, 4), jnp.int32)},
    'beta must be of a float dtype, got int32',
  ),
  'mixed dtypes': (
    {'k': jnp.zeros((2, 5, 2, 8), jnp.bfloat16)},
    'must share one dtype of float32, bfloat16, float64, got float32, '
    'bfloat16, float32',
  ),
  'integers': (
    {n: jnp.zeros(SPEC.arguments()[n].shape, jnp.int32) for n in 'qkv'},
    'float64, got int32, int32, int32',
  ),
  'half': (
    {n: jnp.zeros(SPEC.arguments()[n].shape, jnp.float16) for n in 'qkv'},
    'float64, got float16, float16, float16',
  ),
  'gate axes': (
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
  'state shape': (
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
  'segment dtype': (
    {'segment_ids': jnp.ones((2, 5))},
    'got float32 of shape (2, 5)',
  ),
  'chunk': ({'chunk_size': 0}, 'chunk_size must be at least 1, got 0'),
  'name': (
    {'implementation': 'fast'},
    'implementation of delta_rule must be one of mosaic_gpu, xla, recurrent, '
    "got 'fast'",
  ),
  'no name': (
    {'implementation': ()},
    'implementation of delta_rule is an empty sequence',
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_wrong_arguments_are_refused(case):
  changes, message = REFUSED[case]
  with pytest.raises(ValueError, match=re.escape(message)):
    delta_rule(**_arguments(**changes))


def test_an_empty_sequence_is_refused():
  arguments = {n: a[:, :0] for n, a in _arguments().items()}
  message = 'T must be at least 1, got 0'
  with pytest.raises(ValueError, match=re.escape(message)):
    delta_rule(**arguments)


STEP_REFUSED = {
  'rank': (
    {'q': jnp.zeros((2, 1, 2, 8))},
    'q must have the 3 axes [B, H, K], got shape (2, 1, 2, 8)',
  ),
  'value heads': (
    {'v': jnp.zeros((2, 3, 6)), 'beta': jnp.zeros((2, 3))},
    'got HV=3 and H=2',
  ),
  'gate': ({'g': jnp.zeros((2, 2))}, 'axis HV of g must be 4 as in v, got 2'),
  'state': (
    {'state': jnp.zeros(STATE, jnp.bfloat16)},
    'state must be float32 of shape [B, HV, K, V] = (2, 4, 8, 6), got bfloat16',
  ),
  'dtype': (
    {'v': jnp.zeros((2, 4, 6), jnp.bfloat16)},
    'q, k, v must share one dtype',
  ),
}


@pytest.mark.parametrize('case', STEP_REFUSED)
def test_wrong_arguments_of_a_step_are_refused(case):
  changes, message = STEP_REFUSED[case]
  arguments = _token(_arguments()) | {'state': jnp.zeros(STATE)} | changes
  with pytest.raises(ValueError, match=re.escape(message)):
    delta_rule_step(**arguments)


@pytest.mark.parametrize('normalize_qk', [False, True])
@pytest.mark.parametrize('scale', [None, 0.5])
@pytest.mark.parametrize('gate_shape', [None, (2, 5, 4), (2, 5, 4, 8)])
def test_steps_are_the_op_token_by_token(gate_shape, scale, normalize_qk):
  arguments = _arguments()
  if gate_shape is not None:
    noise = np.random.default_rng(0).exponential(0.1, gate_shape)
    arguments['g'] = -jnp.asarray(noise, jnp.float32)
  options = {'scale': scale, 'normalize_qk': normalize_qk}
  o, final = delta_rule(**arguments, **options)
  state = jnp.zeros(STATE)
  for t in range(SPEC.T):
    token = {n: a[:, t] for n, a in arguments.items()}
    o_t, state = delta_rule_step(**token, state=state, **options)
    assert testing.error(np.float64(o_t), np.float64(o[:, t])) < 1e-6
  assert testing.error(np.float64(state), np.float64(final)) < 1e-6


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('implementation', ['recurrent', 'xla'])
def test_a_step_is_a_sequence_of_one(implementation, dtype):
  arguments = {n: a[:, :1].astype(dtype) for n, a in _arguments().items()}
  rng = np.random.default_rng(1)
  state = jnp.asarray(rng.standard_normal(STATE), jnp.float32)
  o, final = delta_rule(
    **arguments, initial_state=state, implementation=implementation
  )
  o_step, state = delta_rule_step(**_token(arguments), state=state)
  assert (o_step.dtype, state.dtype) == (dtype, jnp.float32)
  # One rounding to the output's dtype may fall the other way.
  ulp = float(jnp.finfo(dtype).eps)
  assert testing.error(np.float64(o_step), np.float64(o[:, 0])) < ulp
  assert testing.error(np.float64(state), np.float64(final)) < 1e-6


def test_xla_declines_float64_and_says_why(caplog):
  reason = 'not xla: it computes in float32, got float64 inputs'
  with jax.enable_x64(True):
    arguments = {n: a.astype('float64') for n, a in _arguments().items()}
    with pytest.raises(NotImplementedError, match=f'delta_rule: {reason}'):
      delta_rule(**arguments, implementation='xla')
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger='pallas_kernels'):
      o, state = delta_rule(**arguments, implementation=('xla', 'recurrent'))
  assert (o.dtype, state.dtype) == ('float64', 'float64')
  assert caplog.messages == [f'delta_rule runs as recurrent ({reason})']


def test_xla_is_the_default_without_a_gpu():
  (kernels, reason), *others = api.DELTA_RULE.explain()
  assert kernels == 'mosaic_gpu'
  assert 'needs a Hopper GPU' in reason
  assert others == [('xla', None), ('recurrent', None)]


def test_zero_is_the_default_initial_state():
  expected = delta_rule(**_arguments(), initial_state=jnp.zeros(STATE))
  for actual, e in zip(delta_rule(**_arguments()), expected, strict=True):
    np.testing.assert_array_equal(actual, e)
