import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark_cases
from experiments import benchmark_programs

CASE = benchmark_cases.Case(
  op='delta_rule', gate='head', name='x', B=1, T=40, H=1, HV=2, K=8, V=8
)


def test_backward_takes_cotangents_of_ones():
  def run(x):
    return x**2, 3 * x

  arguments = {'x': jnp.array([1.0, 2.0])}
  program = benchmark_programs.compile_pass(run, 'forward_backward', arguments)
  (square, triple), (gradients,) = program.bind(arguments)()
  assert (square.tolist(), triple.tolist()) == ([1, 4], [3, 6])
  assert gradients['x'].tolist() == [5, 7]


@pytest.mark.parametrize('implementation', ['xla', 'recurrent'])
def test_the_pass_backward_computes_the_gradients_alone(implementation):
  arguments = CASE.arguments()
  programs = benchmark_programs.compile_all(
    CASE, ('backward', 'forward_backward'), [implementation], arguments
  )
  both = programs['forward_backward', implementation].bind(arguments)()
  backward = programs['backward', implementation]
  (gradients,) = backward.bind(arguments)()
  assert sorted(gradients) == ['beta', 'g', 'k', 'q', 'v']
  for name, expected in both[1][0].items():
    np.testing.assert_allclose(gradients[name], expected, rtol=1e-5, atol=1e-5)
  assert backward.needed_bytes > backward.temp_bytes >= 0


def _addresses(results):
  return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(results)]


@pytest.mark.parametrize('pass_name', benchmark_programs.PASSES)
def test_a_call_writes_where_the_last_results_were(pass_name):
  arguments = CASE.arguments()
  programs = benchmark_programs.compile_all(
    CASE, (pass_name,), ['xla'], arguments
  )
  call = programs[pass_name, 'xla'].bind(arguments)
  first = call()
  values, addresses = jax.tree.map(np.array, first), _addresses(first)
  second = call()
  assert _addresses(second) == addresses
  jax.tree.map(np.testing.assert_array_equal, second, values)


def test_what_an_implementation_does_not_cover_is_a_reason(monkeypatch):
  def refuse(*, implementation, **unused_arguments):
    raise NotImplementedError(f'{implementation} has none')

  monkeypatch.setattr(benchmark_cases.Case, 'function', staticmethod(refuse))
  programs = benchmark_programs.compile_all(
    CASE, ('forward', 'backward'), ['xla'], {'q': jnp.ones(2)}
  )
  assert set(programs.values()) == {'xla has none'}


def test_other_errors_than_missing_memory_are_raised():
  error = jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: no 9 GiB\nframes')
  assert benchmark_programs.exhausted(error) == 'RESOURCE_EXHAUSTED: no 9 GiB'
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    benchmark_programs.exhausted(jax.errors.JaxRuntimeError('INTERNAL: x'))


def test_a_program_that_needs_too_much_is_not_run():
  run = functools.partial(benchmark_programs.compile_all, CASE, ('forward',))
  arguments = CASE.arguments()
  program = run(['xla'], arguments)['forward', 'xla']
  assert benchmark_programs.first_run(program, arguments, 1) == (
    'it needs 0.0 GiB of memory, the device has 0.0'
  )
  call = benchmark_programs.first_run(program, arguments, 1 << 40)
  assert call()[0].shape == (1, 40, 2, 8)
