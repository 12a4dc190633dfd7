"""Programs by hand, and compiled ones whose costs are known by hand."""

import jax
import jax.numpy as jnp
import pytest

from experiments import hlo_text
from experiments import program_costs


def _entry(*lines, before=''):
  body = '\n'.join(f'  {line}' for line in lines)
  return hlo_text.parse(
    f'{before}\nENTRY %main (p: f32[1]) -> f32[1] {{\n{body}\n}}\n'
  )


X = '%x = f32[8,16]{1,0} parameter(0)'
W = '%w = f32[16,32]{1,0} parameter(1)'


def test_a_product_is_two_operations_a_number():
  program = _entry(
    X,
    W,
    'ROOT %y = f32[8,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, '
    'rhs_contracting_dims={0}',
  )
  assert program_costs.flops(program) == 2 * 8 * 16 * 32
  assert program_costs.memory_bytes(program) == 4 * (128 + 512 + 256)


@pytest.mark.parametrize(
  ('shapes', 'attributes', 'expected'),
  [
    # A product as XLA for TPU writes it.
    (((8, 16), (16, 32), (8, 32)), 'dim_labels=bf_io->bf', 2 * 8 * 16 * 32),
    # Six products [8, 16] x [16, 32]: the batch is an axis that is dilated.
    (
      ((6, 8, 16), (6, 16, 32), (6, 8, 32)),
      'window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf',
      6 * 2 * 8 * 16 * 32,
    ),
    # 3 taps over 10 places: the ends have a tap in the padding each.
    (
      ((2, 10, 4), (3, 4, 5), (2, 10, 5)),
      'window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f',
      2 * 2 * (3 * 10 - 2) * 4 * 5,
    ),
  ],
)
def test_convolutions(shapes, attributes, expected):
  x, w, y = (f'f32[{",".join(map(str, shape))}]' for shape in shapes)
  program = _entry(
    f'%x = {x} parameter(0)',
    f'%w = {w} parameter(1)',
    f'ROOT %y = {y} convolution(%x, %w), {attributes}',
  )
  assert program_costs.flops(program) == expected


def test_what_lies_in_a_core_s_own_memory_does_not_count():
  program = _entry(
    '%x = f32[8]{0:T(128)} parameter(0)',
    'ROOT %y = f32[8]{0:T(128)S(1)} copy(%x)',
  )
  assert program_costs.memory_bytes(program) == 32


SLICE = """%sliced (a: f32[24,100], i: s32[]) -> f32[100] {
  %a = f32[24,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,100]{1,0} dynamic-slice(%a, %i, %zero)
}
"""
UPDATE = """%updated (a: f32[24,100], u: f32[1,100], i: s32[]) -> f32[24,100] {
  %a = f32[24,100]{1,0} parameter(0)
  %u = f32[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = f32[24,100]{1,0} dynamic-update-slice(%a, %u, %i, %zero)
}
"""


def test_of_the_stacked_parameters_a_layer_reads_its_own():
  program = _entry(
    '%a.1 = f32[24,100]{1,0} parameter(0)',
    '%i.1 = s32[] parameter(1)',
    'ROOT %y = f32[1,100]{1,0} fusion(%a.1, %i.1), kind=kLoop, calls=%sliced',
    before=SLICE,
  )
  assert program_costs.memory_bytes(program) == 400 + 4 + 400


def test_of_what_is_converted_first_a_slice_is_read_as_it_was():
  program = _entry(
    '%a.1 = bf16[24,100]{1,0} parameter(0)',
    'ROOT %y = f32[3,100]{1,0} fusion(%a.1), kind=kLoop, calls=%converted',
    before="""
%converted (c: bf16[24,100]) -> f32[3,100] {
  %c = bf16[24,100]{1,0} parameter(0)
  %w = f32[24,100]{1,0} convert(%c)
  ROOT %s = f32[3,100]{1,0} slice(%w), slice={[0:3], [0:100]}
}
""",
  )
  assert program_costs.memory_bytes(program) == 3 * 100 * (2 + 4)


OUTER = """
%outer (c: f32[24,100], j: s32[]) -> f32[100] {
  %c = f32[24,100]{1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %f = f32[1,100]{1,0} fusion(%c, %j), kind=kLoop, calls=%sliced
}
"""


def test_so_it_does_through_a_fusion_in_a_fusion():
  program = _entry(
    '%a.1 = f32[24,100]{1,0} parameter(0)',
    '%i.1 = s32[] parameter(1)',
    'ROOT %y = f32[1,100]{1,0} fusion(%a.1, %i.1), kind=kLoop, calls=%outer',
    before=SLICE + OUTER,
  )
  assert program_costs.memory_bytes(program) == 400 + 4 + 400


def test_the_start_of_an_asynchronous_fusion_moves_what_the_fusion_moves():
  program = _entry(
    '%a.1 = f32[24,100]{1,0} parameter(0)',
    '%u.1 = f32[1,100]{1,0} parameter(1)',
    '%i.1 = s32[] parameter(2)',
    '%s.1 = ((f32[24,100], f32[1,100], s32[]), f32[24,100], u32[]) '
    'fusion-start(%a.1, %u.1, %i.1), kind=kLoop, calls=%updated',
    'ROOT %y = f32[24,100]{1,0} fusion-done(%s.1)',
    before=UPDATE,
  )
  assert program_costs.memory_bytes(program) == 400 + 4 + 400


def test_of_the_stacked_activations_a_layer_writes_its_own():
  program = _entry(
    '%a.1 = f32[24,100]{1,0} parameter(0)',
    '%u.1 = f32[1,100]{1,0} parameter(1)',
    '%i.1 = s32[] parameter(2)',
    'ROOT %y = f32[24,100]{1,0} fusion(%a.1, %u.1, %i.1), kind=kLoop, '
    'calls=%updated',
    before=UPDATE,
  )
  assert program_costs.memory_bytes(program) == 400 + 4 + 400


def test_what_a_fusion_passes_on_is_not_moved():
  program = _entry(
    X,
    '%buffer = f32[99]{0} parameter(1)',
    'ROOT %y = (f32[8,16], f32[99]) fusion(%x, %buffer), kind=kOutput, '
    'output_to_operand_aliasing={{1}: (1, {})}, calls=%both',
    before="""%both (a: f32[8,16], b: f32[99]) -> (f32[8,16], f32[99]) {
  %a = f32[8,16] parameter(0)
  %b = f32[99] parameter(1)
  %n = f32[8,16] negate(%a)
  ROOT %t = (f32[8,16], f32[99]) tuple(%n, %b)
}
""",
  )
  assert program_costs.memory_bytes(program) == 2 * 8 * 16 * 4


def test_a_loop_costs_as_often_as_it_turns():
  def f(x, ws):
    def layer(x, w):
      return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, ws)[0]

  compiled = jax.jit(f).lower(jnp.ones((64, 64)), jnp.ones((9, 64, 64)))
  program = hlo_text.parse(compiled.compile().as_text())
  assert program_costs.flops(program) == 9 * 2 * 64**3
  array = 64 * 64 * 4
  # x and w in, y out of the product; y in and out of tanh; no copy of all w.
  found = program_costs.memory_bytes(program)
  assert 9 * 3 * array <= found <= 9 * 8 * array
