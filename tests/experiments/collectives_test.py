"""Lines written by hand, and programs whose traffic is known by hand."""

import types

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from experiments import collectives

MESH = types.SimpleNamespace(shape={'data': 2, 'fsdp': 1, 'tensor': 4})
SHAPE = 'f32[6,5]{1,0}'
SIZE = 6 * 5 * 4


def found_in(line, mesh=MESH):
  text = f'ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n'
  return collectives.collectives(text, mesh)


@pytest.mark.parametrize(
  ('groups', 'axes', 'size'),
  [
    ('{{0,1,2,3},{4,5,6,7}}', ('tensor',), 4),
    ('{{0,4},{1,5},{2,6},{3,7}}', ('data',), 2),
    ('{}', ('data', 'tensor'), 8),
    ('[2,4]<=[8]', ('tensor',), 4),
    ('[4,2]<=[2,4]T(1,0)', ('data',), 2),
    ('[1,8]<=[8]', ('data', 'tensor'), 8),
    ('[4,2]<=[2,2,2]T(0,2,1)', ('tensor',), 2),
    ("mesh['a'=2,'b'=4] {'a'}", ('data',), 2),
    ("mesh['a'=2,'b'=4] {'b':(1)2}", ('tensor',), 2),
    ("mesh['a'=2,'b'=4] {'a','b'}", ('data', 'tensor'), 8),
    ("mesh['b'=4,'a'=2] {'b'}", ('data', 'tensor'), 4),
  ],
)
def test_axes_of_every_form_of_groups(groups, axes, size):
  (one,) = found_in(
    f'%x = {SHAPE} all-reduce(%p), channel_id=1, replica_groups={groups}, '
    'use_global_device_ids=true'
  )
  assert (one.axes, one.group_size) == (axes, size)
  assert one.bytes == SIZE
  assert one.bytes_per_device == 2 * SIZE * (size - 1) / size


@pytest.mark.parametrize(
  ('line', 'kind', 'size', 'sent'),
  [
    (f'{SHAPE} all-gather(%p)', 'all-gather', SIZE, 0.75 * SIZE),
    (
      f'(f32[6,1]{{1,0}}, {SHAPE}) all-gather-start(%p)',
      'all-gather',
      SIZE,
      0.75 * SIZE,
    ),
    (
      f'((f32[6,1], f32[6,1]), ({SHAPE}, {SHAPE})) all-gather-start(%p, %q)',
      'all-gather',
      2 * SIZE,
      1.5 * SIZE,
    ),
    (f'{SHAPE} all-reduce-start(%p)', 'all-reduce', SIZE, 1.5 * SIZE),
    (
      f'({SHAPE}, {SHAPE}) all-reduce-start(%p, %q)',
      'all-reduce',
      2 * SIZE,
      3 * SIZE,
    ),
    (f'{SHAPE} reduce-scatter(%p)', 'reduce-scatter', 4 * SIZE, 3 * SIZE),
    (f'{SHAPE} all-to-all(%p)', 'all-to-all', SIZE, 0.75 * SIZE),
  ],
)
def test_bytes_of_every_kind(line, kind, size, sent):
  (one,) = found_in(f'%x = {line}, replica_groups=[2,4]<=[8]')
  assert one == collectives.Collective(
    kind=kind, axes=('tensor',), group_size=4, bytes=size, executions=1
  )
  assert one.bytes_per_device == sent


def test_a_permute_sends_its_operand():
  (one,) = found_in(
    f'%x = ({SHAPE}, {SHAPE}, u32[], u32[]) collective-permute-start(%p), '
    'channel_id=1, source_target_pairs={{0,1},{1,2},{4,5},{5,6}}'
  )
  assert (one.kind, one.axes) == ('collective-permute', ('tensor',))
  assert one.bytes_per_device == SIZE


def test_the_end_of_an_asynchronous_one_does_not_count_again():
  assert not found_in(f'%x = {SHAPE} all-reduce-done(%y)')


def test_a_device_by_itself_exchanges_nothing():
  groups = ','.join(f'{{{i}}}' for i in range(8))
  line = f'%x = {SHAPE} all-reduce(%p), replica_groups={{{groups}}}'
  assert not found_in(line)


def test_a_scatter_that_is_a_fusion_is_found():
  text = f"""%all-reduce-scatter.1 (p: f32[6,5]) -> f32[3,5] {{
  %p = {SHAPE} parameter(0)
  ROOT %r = {SHAPE} all-reduce(%p), replica_groups=[4,2]<=[2,4]T(1,0)
}}

ENTRY %main (p: f32[6,5]) -> f32[3,5] {{
  %p.1 = {SHAPE} parameter(0)
  ROOT %f = f32[3,5] fusion(%p.1), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""
  (one,) = collectives.collectives(text, MESH)
  assert (one.kind, one.bytes_per_device) == ('reduce-scatter', SIZE / 2)


def test_a_chain_of_fusions_sends_once():
  gather = (
    f'{SHAPE} all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0), '
    'frontend_attributes={chain_id="13"}'
  )
  text = f"""%start (p: f32[3,5]) -> f32[6,5] {{
  %p = f32[3,5] parameter(0)
  %g = {gather}
  ROOT %c = {SHAPE} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%done (p: f32[3,5]) -> f32[6,5] {{
  %p = f32[3,5] parameter(0)
  %g = {gather}
  ROOT %c = {SHAPE} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (p: f32[3,5]) -> f32[6,5] {{
  %p.1 = f32[3,5] parameter(0)
  %f = {SHAPE} fusion(%p.1), kind=kCustom, calls=%start
  ROOT %e = {SHAPE} fusion(%p.1), kind=kCustom, calls=%done
}}
"""
  (one,) = collectives.collectives(text, MESH)
  assert (one.kind, one.bytes_per_device) == ('all-gather', SIZE / 2)


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('all-reduce(%p), replica_groups=odd', 'groups are not understood'),
    ('ragged-all-to-all(%p)', 'ragged-all-to-all is not understood'),
  ],
)
def test_what_is_not_understood_is_refused(line, message):
  with pytest.raises(ValueError, match=message):
    found_in(f'%x = {SHAPE} {line}')


@pytest.fixture
def mesh():
  return jax.make_mesh((2, 4), ('fsdp', 'tensor'), (AxisType.Auto,) * 2)


def _traffic(function, mesh, specs, out, *shapes):
  """Returns {(axes, kind): bytes} of a function inside of a shard_map."""
  mapped = jax.shard_map(
    function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
  )
  arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
  text = jax.jit(mapped).lower(*arguments).compile().as_text()
  return collectives.bytes_by_axes(collectives.collectives(text, mesh))


@pytest.mark.parametrize(
  ('function', 'kind', 'share'),
  [
    (lambda x: jax.lax.psum(x, 'tensor'), 'all-reduce', 1.5),
    (
      lambda x: jax.lax.psum_scatter(x, 'tensor', tiled=True),
      'reduce-scatter',
      0.75,
    ),
    (
      lambda x: jax.lax.all_gather(x, 'tensor', tiled=True),
      'all-gather',
      4 * 0.75,
    ),
    (
      lambda x: jax.lax.ppermute(x, 'tensor', [(0, 1), (1, 2)]),
      'collective-permute',
      1,
    ),
  ],
)
def test_traffic_of_compiled_programs(mesh, function, kind, share):
  found = _traffic(function, mesh, P(), P('tensor'), (16, 8))
  assert found == {(('tensor',), kind): share * 16 * 8 * 4}


def test_what_a_loop_sends_counts_every_turn(mesh):
  def body(carry, w):
    w = jax.lax.all_gather(w, 'fsdp', tiled=True)  # [16, 16]
    return jax.lax.psum(carry @ w, ('fsdp', 'tensor')), None

  def function(x, ws):
    return jax.lax.scan(body, x, ws)[0]

  found = _traffic(
    function, mesh, (P(), P(None, 'fsdp')), P(), (4, 16), (7, 16, 16)
  )
  assert found == {
    (('fsdp',), 'all-gather'): 7 * 16 * 16 * 4 / 2,
    (('fsdp', 'tensor'), 'all-reduce'): 7 * 2 * 4 * 16 * 4 * 7 / 8,
  }


def test_the_gradient_of_shared_rows_is_summed(mesh):
  def gradient(w, x):
    return jax.grad(lambda w: ((x @ w) ** 2).sum())(w)  # [64, 32]

  rows = jax.NamedSharding(mesh, P('fsdp'))
  shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((64, 32), (8, 64))]
  lowered = jax.jit(gradient, in_shardings=(None, rows)).lower(*shapes)
  text = lowered.compile().as_text()
  totals = collectives.bytes_by_axes(collectives.collectives(text, mesh))
  assert totals == {(('fsdp',), 'all-reduce'): 64 * 32 * 4}
