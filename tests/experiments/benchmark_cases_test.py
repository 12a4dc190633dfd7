import itertools

import jax
import jax.numpy as jnp
import pytest

from experiments import benchmark_cases
from pallas_kernels.delta_rule import arg_specs

SIZES = {'name': 'x', 'B': 2, 'T': 24, 'H': 2, 'K': 8, 'V': 4}


def _variants():
  return list(
    dict.fromkeys(
      (case.op, case.gate, case.keys_per_token)
      for case in benchmark_cases.suite('cpu').cases
    )
  )


def test_the_cpu_suite_has_every_op_and_gate_at_every_cpu_size():
  assert _variants() == [
    ('delta_rule', 'none', 1),
    ('delta_rule', 'head', 1),
    ('delta_rule', 'channel', 1),
    ('delta_product', 'none', 2),
    ('diagonal_plus_low_rank', 'channel', 1),
    ('linear_attention', 'none', 1),
    ('linear_attention', 'head', 1),
    ('linear_attention', 'channel', 1),
  ]
  cases = benchmark_cases.suite('cpu').cases
  assert len(set(cases)) == len(cases) == 8 * 2
  for spec in arg_specs.with_tag('cpu'):
    sizes = [c for c in cases if c.name == spec.name]
    assert len(sizes) == 8
    assert {(c.B, c.T, c.H, c.K, c.V, c.dtype) for c in sizes} == {
      (spec.B, spec.T, spec.HV, spec.K, spec.V, spec.dtype)
    }


@pytest.mark.parametrize(('op', 'gate', 'n'), _variants())
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


def test_the_length_suite_doubles_to_64k():
  suite = benchmark_cases.suite('length')
  lengths = [case.T for case in suite.cases]
  assert lengths == 2 * [1024 << i for i in range(7)]
  assert suite.cases_take_turns
  assert [case.variant for case in suite.cases[::7]] == ['plain', 'g per head']
  assert suite.implementations == ('xla',)


def test_the_paper_suite_keeps_tokens_and_width():
  suite = benchmark_cases.suite('paper')
  assert len(suite.cases) == 3 * 6
  assert {(c.B * c.T, c.H * c.K, c.dtype) for c in suite.cases} == {
    (16384, 2048, 'bfloat16')
  }
  assert {c.T for c in suite.cases} == set(benchmark_cases.PAPER_LENGTHS)
  assert suite.settings == {'tokens': 16384, 'model_width': 2048}


def test_the_gpu_suite_checks_before_it_times():
  suite = benchmark_cases.suite('gpu')
  assert suite.implementations == ('mosaic_gpu', 'xla')
  sizes = [(c.B, c.T, c.H, c.HV, c.K, c.variant) for c in suite.cases]
  assert sizes == [
    *((*size, 'plain') for size in benchmark_cases.GPU_SIZES),
    *((*size, 'g per head') for size in benchmark_cases.GPU_GATED_SIZES),
    *((*size, 'plain, l2') for size in benchmark_cases.GPU_NORMALIZED_SIZES),
  ]
  assert len({(c.name, c.variant) for c in suite.cases}) == 10
  normalized = {(c.K, c.gate) for c in suite.checked if c.normalize_qk}
  assert normalized == set(itertools.product((64, 128), ('none', 'head')))
  grouped = {(c.K, c.gate, c.HV > c.H) for c in suite.checked}
  assert grouped == {
    (dim, *how)
    for dim in (64, 128, 256)
    for how in (('none', False), ('none', True), ('head', True))
  }
  unequal = {(c.K, c.V, c.gate) for c in suite.checked if c.K != c.V}
  assert unequal == {
    (*dims, gate)
    for dims in ((64, 128), (128, 64))
    for gate in ('none', 'head')
  }
  assert {c.dtype for c in suite.cases + suite.checked} == {'bfloat16'}


def test_only_some_sizes_and_their_checks():
  only = ['b8_t1024_h8_d64', 'b4_t2048_h16_d128']
  suite = benchmark_cases.suite('gpu', only=only)
  assert [c.name for c in suite.cases] == only[::-1]
  assert {(c.K, c.V) for c in suite.checked} == {
    (key_dim, value_dim) for key_dim in (64, 128) for value_dim in (64, 128)
  }
  suite = benchmark_cases.suite('gpu', only=only[:1])
  assert {c.K for c in suite.checked} == {64}
  assert len(suite.checked) == 5


def test_unknown_sizes_are_refused():
  with pytest.raises(ValueError, match='has the sizes length_1k, .* got x, y$'):
    benchmark_cases.suite('length', only=['x', 'length_2k', 'y'])


def test_sizes_that_leave_no_row_or_head_are_named():
  cases = benchmark_cases.suite('paper', tokens=1024, model_width=128).cases
  problems = {(c.K, c.T): c.problem for c in cases}
  assert problems[64, 1024] is None
  assert problems[64, 2048] == 'the tokens in all make no row of T=2048'
  assert problems[256, 512] == 'the width makes no head of K=256'


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


def test_an_unknown_suite_is_refused():
  with pytest.raises(ValueError, match="the suite must be one of .*'tpu'"):
    benchmark_cases.suite('tpu')
