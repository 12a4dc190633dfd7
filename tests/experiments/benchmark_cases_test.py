import jax
import jax.numpy as jnp
import pytest

from experiments import benchmark_cases
from experiments import benchmark_suites

SIZES = {'name': 'x', 'B': 2, 'T': 24, 'H': 2, 'K': 8, 'V': 4}
VARIANTS = dict.fromkeys(
  (case.op, case.gate, case.keys_per_token)
  for case in benchmark_suites.suite('cpu').cases
)


@pytest.mark.parametrize(('op', 'gate', 'n'), list(VARIANTS))
def test_ops_take_their_arguments(op, gate, n):
  case = benchmark_cases.Case(op=op, gate=gate, keys_per_token=n, **SIZES)
  arguments = case.arguments()
  axes = {'none': None, 'head': 3, 'channel': 4}[gate]
  assert (arguments['g'].ndim if 'g' in arguments else None) == axes
  assert arguments['k'].shape == ((2, 24, n, 2, 8) if n > 1 else (2, 24, 2, 8))
  o, state = jax.eval_shape(lambda a: case.function(**a), arguments)
  assert (o.shape, state.shape) == ((2, 24, 2, 4), (2, 2, 8, 4))


def test_values_are_grouped():
  case = benchmark_cases.Case(op='delta_rule', gate='head', **SIZES | {'HV': 4})
  arguments = case.arguments()
  shapes = {name: x.shape for name, x in arguments.items()}
  assert shapes['k'] == (2, 24, 2, 8) and shapes['v'] == (2, 24, 4, 4)
  assert shapes['g'] == shapes['beta'] == (2, 24, 4)
  o, _ = jax.eval_shape(lambda a: case.function(**a), arguments)
  assert o.shape == (2, 24, 4, 4)
  norms = jnp.linalg.norm(arguments['k'], axis=-1)
  assert jnp.allclose(norms, 1) and jnp.max(arguments['g']) < 0
  assert 0 < jnp.min(arguments['beta']) < jnp.max(arguments['beta']) < 1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'op': 'softmax'}, "op of x must be one of .*, got 'softmax'"),
    ({'gate': 'row'}, "gate of x must be one of .*, got 'row'"),
    ({'HV': 3}, 'HV of x must be a multiple of H, got HV=3 and H=2'),
    ({'keys_per_token': 2}, 'keys_per_token of delta_rule must be 1, got 2'),
  ],
)
def test_unknown_cases_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    benchmark_cases.Case(**{'op': 'delta_rule'} | SIZES | changes)
