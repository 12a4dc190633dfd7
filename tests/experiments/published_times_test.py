import dataclasses

from experiments import benchmark_suites
from experiments import published_times


def test_every_published_time_is_of_a_gated_case_of_the_suite():
  cases = benchmark_suites.suite('gpu').cases
  found = {
    (case.name, case.gate, name): published_times.milliseconds(case, name)
    for case in cases
    for name in ('forward', 'forward_backward', 'backward')
  }
  assert {key: ms for key, ms in found.items() if ms} == {
    ('b1_t8192_h32_d128', 'head', 'forward'): 0.283,
    ('b1_t32768_h32_d128', 'head', 'forward'): 0.887,
    ('b1_t8192_h16_hv32_d128', 'head', 'backward'): 0.789,
  }


def test_other_sizes_have_no_published_time():
  cases = benchmark_suites.suite('gpu').cases
  case = next(
    c for c in cases if c.name == 'b1_t32768_h32_d128' and c.gate == 'head'
  )
  assert published_times.milliseconds(case, 'forward') == 0.887
  for changed in ({'K': 64}, {'normalize_qk': True}):
    other = dataclasses.replace(case, **changed)
    assert published_times.milliseconds(other, 'forward') is None
