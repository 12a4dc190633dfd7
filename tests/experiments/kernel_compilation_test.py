"""The gate: the real kernels, compiled for an H200 with no GPU."""

import functools
import itertools
import os
import re

import jax
import pytest

from experiments import ahead_of_time
from experiments import kernel_compilation
from pallas_kernels.delta_rule import api
from pallas_kernels.delta_rule import mosaic_gpu


@pytest.fixture
def compiler():
  """Skips where nothing can be compiled for a GPU; fails there in CI."""
  reason = ahead_of_time.missing()
  if reason:
    (pytest.fail if os.environ.get('CI') else pytest.skip)(reason)


KERNELS = tuple(
  f'delta_rule_{name}'
  for name in (
    'inverse',
    'recurrence',
    'recurrence_saving',
    'states',
    'recurrence_bwd',
    'part',
    'part_bwd',
    'chunk_bwd',
  )
)
# Two of them in one launch.
SHARED = tuple(
  f'delta_rule_{name}'
  for name in (
    'chunk_fwd_recurrence',
    'chunk_fwd_recurrence_saving',
    'recurrence_chunk_bwd',
  )
)


@functools.cache
def _rows():
  # Normalised keys at the larger width alone, where registers are scarcer; all
  # cases are in `kernel_report`.
  given, normalized = (
    kernel_compilation.kernel_rows(
      'h200', head_dims=head_dims, normalizations=[is_normalized]
    )
    for is_normalized, head_dims in ((False, [64, 128]), (True, [128]))
  )
  return (*given, *normalized)


@pytest.mark.usefixtures('compiler')
def test_all_kernels_are_compiled_at_every_size():
  rows = _rows()
  cases = {(r['kernel'], r['head_dim'], r['gate']) for r in rows}
  expected = set(
    itertools.product((*KERNELS, *SHARED), (64, 128), ('none', 'head'))
  )
  assert cases == expected
  normalized = {(r['kernel'], r['gate']) for r in rows if r['normalize_qk']}
  assert len(normalized) == (len(KERNELS) + len(SHARED)) * 2
  whole = [r for r in rows if r['columns'] == 128 == r['head_dim']]
  assert {r['kernel'] for r in whole} == set(KERNELS[1:-1])
  assert len(whole) == len(KERNELS[1:-1]) * 4
  whole = [r for r in rows if r['columns'] == 128 > r['head_dim']]
  assert [r['kernel'] for r in whole] == ['delta_rule_part'] * 2
  # More than the compulsory bytes of q, k, v, beta and the gradients.
  assert all(row['bytes_per_token'] > 2 * row['head_dim'] for row in rows)
  alone = [r for r in rows if r['columns'] == 64 and r['kernel'] in KERNELS]
  assert all(r['flops_per_token'] > 0 for r in alone)


@pytest.mark.usefixtures('compiler')
def test_the_docstring_states_the_products_of_the_kernels():
  table = re.findall(
    r'^    (\w+) +[a-z].* \d+ +([\d.]+)$', mosaic_gpu.__doc__, re.MULTILINE
  )
  stated = {f'delta_rule_{name}': float(count) for name, count in table}
  assert stated == {
    row['kernel']: row['flops_per_token'] / (2 * 64**2)
    for row in _rows()
    if (row['head_dim'], row['columns'], row['gate']) == (128, 64, 'none')
    and not row['normalize_qk']
    and row['kernel'] in KERNELS
  }


@pytest.mark.usefixtures('compiler')
@pytest.mark.parametrize('gate', kernel_compilation.GATES)
@pytest.mark.parametrize('head_dim', kernel_compilation.HEAD_DIMS)
@pytest.mark.parametrize('kernel', (*KERNELS, *SHARED))
def test_a_kernel_keeps_its_gates(kernel, head_dim, gate):
  found = [
    row
    for row in _rows()
    if (row['kernel'], row['head_dim'], row['gate']) == (kernel, head_dim, gate)
  ]
  assert found or (kernel, gate) == (SHARED[-1], 'head')
  assert not [row['broken'] for row in found if row['broken']]


@pytest.mark.drill
@pytest.mark.usefixtures('compiler')
def test_a_training_step_of_the_1b_preset_fits_one_device():
  row = kernel_compilation.train_step_row('h200')
  assert 0 < row['temp_bytes'] <= kernel_compilation.MOST_TEMP_BYTES
  assert row['broken'] == []
  # Parameters and both moments of 1.37e9 numbers.
  assert row['argument_bytes'] > 3 * 4 * 1_365_677_056


def test_a_step_that_needs_too_much_is_broken(monkeypatch):
  found = {'temp_bytes': kernel_compilation.MOST_TEMP_BYTES + 1}
  monkeypatch.setattr(ahead_of_time, 'run', lambda *_: found)
  (broken,) = kernel_compilation.train_step_row('h200')['broken']
  assert broken.startswith('temp_bytes must be <= ')


def test_a_kernel_that_is_not_called_has_no_bytes():
  lowered = jax.jit(lambda x: x + x).lower(1.0)
  with pytest.raises(ValueError, match='must be called once, got 0 calls'):
    kernel_compilation.call_bytes(lowered, 'delta_rule_inverse')


def test_kernels_that_are_let_in_share_a_row_by_themselves(monkeypatch):
  op = api.DELTA_RULE
  monkeypatch.setattr(api, 'DELTA_RULE', op)
  kernel_compilation.use_mosaic_gpu()
  assert api.DELTA_RULE.explain()[0] == ('mosaic_gpu', None)
  assert api.DELTA_RULE.implementations[0].exchanges
