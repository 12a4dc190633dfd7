import jax
import jax.numpy as jnp
import pytest

from experiments import hlo_text

PROGRAM = """HloModule jit_f, entry_computation_layout={(f32[8])->f32[8]}

%fused (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %neg = f32[8]{0} negate(%p.1)
}

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %y = f32[8]{0:T(128)S(1)} fusion(%x), kind=kLoop, calls=%fused
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, /*index=1*/%y)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %arg.1 = (s32[], f32[8]{0}) parameter(0)
  %bound = s32[] constant(5)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8]{0}) tuple(%zero, %p)
  %loop = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def executions(text):
  found = hlo_text.executed(hlo_text.parse(text))
  return {one.name: times for _, one, times in found}


def test_the_turns_of_a_loop_are_read_from_its_condition():
  found = executions(PROGRAM)
  assert found['neg'] == found['y'] == 5
  assert found['loop'] == 1


def test_the_turns_that_the_compiler_knew_come_first():
  known = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
  found = executions(PROGRAM.replace('body=%body', known))
  assert found['neg'] == 7


def test_the_turns_of_another_loop_are_not_known():
  found = executions(PROGRAM.replace('direction=LT', 'direction=NE'))
  assert found['neg'] is None
  assert found['loop'] == 1


def test_all_branches_of_a_conditional_run():
  conditional = (
    '%c = f32[8]{0} conditional(%zero, %p, %p), '
    'branch_computations={%fused, %fused}'
  )
  text = PROGRAM.replace('  %start =', f'  {conditional}\n  %start =')
  program = hlo_text.parse(text)
  (found,) = (
    i for i in program.computations['main'] if i.opcode == 'conditional'
  )
  assert list(hlo_text.called(program, found)) == [('fused', 1)] * 2


def test_an_instruction_is_read_whole():
  program = hlo_text.parse(PROGRAM)
  found = {i.name: i for i in program.computations['body']}
  assert found['y'].type == 'f32[8]{0:T(128)S(1)}'
  assert found['y'].operands == ('x',)
  assert found['out'].operands == ('i', 'y') and found['out'].is_root
  assert found['i'].attributes == ', index=0'


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('f32[]', 4),
    ('(bf16[3,5]{1,0:T(8,128)(2,1)}, pred[7]{0})', 30 + 7),
    ('s4[3]{0}', 2),
    ('f8e4m3fn[2,2]{1,0}', 4),
    ('token[]', 0),
    ('c64[2]{0}', 16),
  ],
)
def test_bytes_of_types(text, expected):
  assert hlo_text.num_bytes(text) == expected


def test_elements_of_a_nested_tuple():
  text = '((f32[2,3]{1,0}, f32[4]{0}), f32[5]{0})'
  assert hlo_text.elements(text) == ['(f32[2,3]{1,0}, f32[4]{0})', 'f32[5]{0}']


def test_a_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo_text.parse('HloModule empty')


def test_a_line_that_is_no_instruction_is_refused():
  broken = PROGRAM.replace('parameter(0)', 'parameter')
  with pytest.raises(ValueError, match='no instruction is read from'):
    hlo_text.parse(broken)


def test_a_scan_that_was_compiled_turns_as_often_as_it_is_long():
  def f(x):
    return jax.lax.scan(lambda c, _: (jnp.sin(c @ x), None), x, length=9)[0]

  text = jax.jit(f).lower(jnp.ones((8, 8))).compile().as_text()
  found = hlo_text.executed(hlo_text.parse(text))
  assert {times for _, one, times in found if 'sine' in one.opcode} == {9}
