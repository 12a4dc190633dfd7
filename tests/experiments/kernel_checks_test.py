import functools

import jax
import jax.numpy as jnp
import pytest

from experiments import benchmark_cases
from experiments import kernel_checks
import pallas_kernels
from pallas_kernels import sequence_parallel

SIZES = {'name': 'x', 'B': 1, 'T': 40, 'H': 2, 'K': 16, 'V': 16}


def _check(gate='head', **changes):
  case = benchmark_cases.Case(
    op='delta_rule', gate=gate, dtype='bfloat16', HV=4, **SIZES
  )
  return kernel_checks.Check(case=case, implementation='xla', **changes)


@pytest.fixture
def wrong_op(monkeypatch):
  """Lets `xla` scale its output a little wrong."""
  right = pallas_kernels.delta_rule

  @functools.wraps(right)
  def wrong(*, implementation, **arguments):
    o, state = right(implementation=implementation, **arguments)
    factor = 1.03 if implementation == 'xla' else 1
    return (o.astype('float32') * factor).astype(o.dtype), state

  monkeypatch.setattr(pallas_kernels, 'delta_rule', wrong)
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.fixture
def no_exchange(monkeypatch):
  """Lets parts of a row know nothing of one another."""
  right = sequence_parallel._shift

  def wrong(*args):
    return jax.tree.map(jnp.zeros_like, right(*args))

  monkeypatch.setattr(sequence_parallel, '_shift', wrong)
  jax.clear_caches()
  yield
  jax.clear_caches()


@pytest.mark.parametrize('gate', ['none', 'head'])
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'cosine': 0.9, 'with_segments': True},
    {'with_segments': True, 'parts': 2},
  ],
)
def test_what_is_right_passes(gate, changes):
  row = kernel_checks.row(_check(gate, **changes))
  assert row['broken'] == []
  assert row['identical']
  assert ('dg' in row['errors']) == (gate == 'head')
  assert all(0 < e < 0.02 for e in row['errors'].values())
  kernel_checks.require_right(row)
  line = kernel_checks.format_row(row)
  assert 'right, the same in two runs' in line
  assert (', 2 parts: ' in line) == ('parts' in changes)


@pytest.mark.usefixtures('wrong_op')
def test_a_result_three_per_cent_off_stops_the_run():
  row = kernel_checks.row(_check())
  assert any(line.startswith('o must be within') for line in row['broken'])
  with pytest.raises(kernel_checks.WrongResultError, match='nothing was timed'):
    kernel_checks.require_right(row)


@pytest.mark.usefixtures('no_exchange')
def test_parts_are_held_to_the_whole_row():
  assert not kernel_checks.row(_check(gate='none'))['broken']
  assert kernel_checks.row(_check(gate='none', parts=2))['broken']


def test_more_parts_than_devices_are_refused():
  parts = jax.device_count() + 1
  with pytest.raises(ValueError, match=f'with {parts} parts needs as many'):
    kernel_checks.row(_check(parts=parts))


def test_a_bit_that_moves_between_runs_stops_the_run(monkeypatch):
  monkeypatch.setattr(kernel_checks, '_is_identical', lambda *_: False)
  row = kernel_checks.row(_check())
  assert row['broken'] == ['two runs must agree in every bit, they differ']


@pytest.mark.parametrize('may_refuse', [True, False])
def test_a_refusal_is_right_only_where_it_may_be(monkeypatch, may_refuse):
  right = pallas_kernels.delta_rule

  @functools.wraps(right)
  def refuse(*, implementation, **arguments):
    if implementation == 'xla':
      raise NotImplementedError('K must be 64')
    return right(implementation=implementation, **arguments)

  monkeypatch.setattr(pallas_kernels, 'delta_rule', refuse)
  jax.clear_caches()
  row = kernel_checks.row(_check(may_refuse=may_refuse))
  assert row['refused'] == 'K must be 64'
  assert 'K must be 64' in kernel_checks.format_row(row)
  if may_refuse:
    kernel_checks.require_right(row)
  else:
    with pytest.raises(kernel_checks.WrongResultError, match='K must be 64'):
      kernel_checks.require_right(row)
