import itertools

import pytest

from experiments import benchmark_suites
from pallas_kernels.delta_rule import arg_specs


def test_the_cpu_suite_has_every_op_and_gate_at_every_cpu_size():
  cases = benchmark_suites.suite('cpu').cases
  variants = dict.fromkeys((c.op, c.gate, c.keys_per_token) for c in cases)
  assert list(variants) == [
    ('delta_rule', 'none', 1),
    ('delta_rule', 'head', 1),
    ('delta_rule', 'channel', 1),
    ('delta_product', 'none', 2),
    ('diagonal_plus_low_rank', 'channel', 1),
    ('linear_attention', 'none', 1),
    ('linear_attention', 'head', 1),
    ('linear_attention', 'channel', 1),
  ]
  assert len(set(cases)) == len(cases) == 8 * 2
  for spec in arg_specs.with_tag('cpu'):
    sizes = [c for c in cases if c.name == spec.name]
    assert len(sizes) == 8
    assert {(c.B, c.T, c.H, c.K, c.V, c.dtype) for c in sizes} == {
      (spec.B, spec.T, spec.HV, spec.K, spec.V, spec.dtype)
    }


def test_the_length_suite_doubles_to_64k():
  suite = benchmark_suites.suite('length')
  lengths = [case.T for case in suite.cases]
  assert lengths == 2 * [1024 << i for i in range(7)]
  assert suite.cases_take_turns
  assert [case.variant for case in suite.cases[::7]] == ['plain', 'g per head']
  assert suite.implementations == ('xla',)


def test_the_paper_suite_keeps_tokens_and_width():
  suite = benchmark_suites.suite('paper')
  assert len(suite.cases) == 3 * 6
  assert {(c.B * c.T, c.H * c.K, c.dtype) for c in suite.cases} == {
    (16384, 2048, 'bfloat16')
  }
  assert {c.T for c in suite.cases} == set(benchmark_suites.PAPER_LENGTHS)
  assert suite.settings == {'tokens': 16384, 'model_width': 2048}


def test_the_gpu_suite_checks_before_it_times():
  suite = benchmark_suites.suite('gpu')
  assert suite.implementations == ('mosaic_gpu', 'xla')
  sizes = [(c.B, c.T, c.H, c.HV, c.K, c.variant) for c in suite.cases]
  assert sizes == [
    *((*size, 'plain') for size in benchmark_suites.GPU_SIZES),
    *((*size, 'g per head') for size in benchmark_suites.GPU_GATED_SIZES),
    *((*size, 'plain, l2') for size in benchmark_suites.GPU_NORMALIZED_SIZES),
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


def test_the_suite_of_parts_only_checks():
  suite = benchmark_suites.suite('sequence')
  assert (suite.cases, suite.checked_parts) == ((), 2)
  assert suite.implementations == ('mosaic_gpu',)
  kinds = {(c.K, c.gate, c.normalize_qk) for c in suite.checked}
  assert kinds == set(
    itertools.product((64, 128), ('none', 'head'), (False, True))
  )
  # Parts that are no whole chunks, and parts of many.
  assert {c.T // suite.checked_parts for c in suite.checked} == {100, 1024}


def test_only_some_sizes_and_their_checks():
  only = ['b8_t1024_h8_d64', 'b4_t2048_h16_d128']
  suite = benchmark_suites.suite('gpu', only=only)
  assert [c.name for c in suite.cases] == only[::-1]
  assert {(c.K, c.V) for c in suite.checked} == {
    (key_dim, value_dim) for key_dim in (64, 128) for value_dim in (64, 128)
  }
  suite = benchmark_suites.suite('gpu', only=only[:1])
  assert {c.K for c in suite.checked} == {64}
  assert len(suite.checked) == 5


def test_unknown_sizes_are_refused():
  with pytest.raises(ValueError, match='has the sizes length_1k, .* got x, y$'):
    benchmark_suites.suite('length', only=['x', 'length_2k', 'y'])


def test_sizes_that_leave_no_row_or_head_are_named():
  cases = benchmark_suites.suite('paper', tokens=1024, model_width=128).cases
  problems = {(c.K, c.T): c.problem for c in cases}
  assert problems[64, 1024] is None
  assert problems[64, 2048] == 'the tokens in all make no row of T=2048'
  assert problems[256, 512] == 'the width makes no head of K=256'


def test_an_unknown_suite_is_refused():
  with pytest.raises(ValueError, match="the suite must be one of .*'tpu'"):
    benchmark_suites.suite('tpu')
