import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels import delta_rule
from pallas_kernels import sharded_call
from pallas_kernels.delta_rule import arg_specs
from tests import testing

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
SPEC = arg_specs.ArgSpec(name='base', B=8, T=10, H=2, HV=4, K=4, V=3)
MESHES = (
  ((8,), ('data',)),
  ((4, 2), ('data', 'model')),
  ((2, 2, 2), ('data', 'fsdp', 'tensor')),
)
# The mesh axes of batch and heads in each of them.
CARRIERS = (('data', None), ('data', 'model'), (('data', 'fsdp'), 'tensor'))

for_each_kind = pytest.mark.parametrize('kind', [AUTO, EXPLICIT])
for_each_mesh = pytest.mark.parametrize(
  ('mesh', 'carriers'), tuple(zip(MESHES, CARRIERS, strict=True))
)


def _mesh(shape, names, *kinds):
  kinds = kinds * len(names) if len(kinds) == 1 else kinds
  devices = jax.devices()[: math.prod(shape)]
  return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)


def _arguments(spec=SPEC):
  rng = np.random.default_rng(1)
  state = rng.standard_normal((spec.B, spec.HV, spec.K, spec.V))
  decay = -np.abs(rng.standard_normal((spec.B, spec.T, spec.HV)))
  return arg_specs.random_arguments(spec) | {
    'g': jnp.asarray(decay, jnp.float32),
    'initial_state': jnp.asarray(state, jnp.float32),
  }


def _segment_ids(spec=SPEC):
  row = np.arange(spec.T) // 4
  return jnp.asarray(np.stack([row + b % 3 for b in range(spec.B)]), jnp.int32)


def _loss(arguments, segment_ids=None, *, implementation='recurrent'):
  results = delta_rule(
    **arguments,
    segment_ids=segment_ids,
    chunk_size=4,
    implementation=implementation,
  )
  weights = (jnp.cos(jnp.arange(r.size)).reshape(r.shape) for r in results)
  loss = sum(jnp.sum(r * w) for r, w in zip(results, weights, strict=True))
  return loss, results


def _value_and_grad(implementation='recurrent'):
  loss = functools.partial(_loss, implementation=implementation)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def _on_one_device(implementation='recurrent', *, segments=True):
  arguments = _arguments()
  if implementation == 'xla':
    arguments['g'] = None
  ids = _segment_ids() if segments else None
  return _value_and_grad(implementation)(arguments, ids)


def _place(arguments, mesh, batch, heads):
  """Shards batch, the first axis, and heads; T of all but the state stays."""
  return {
    name: jax.device_put(
      array,
      jax.NamedSharding(
        mesh,
        P(batch, heads) if name == 'initial_state' else P(batch, None, heads),
      ),
    )
    for name, array in arguments.items()
  }


def _assert_close(actual, expected):
  pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
  for a, e in pairs:
    assert a.shape == e.shape
    assert testing.error(np.float64(a), np.float64(e)) < 1e-6


@for_each_kind
@for_each_mesh
def test_values_and_gradients_without_gathering(mesh, carriers, kind):
  mesh = _mesh(*mesh, kind)
  with jax.set_mesh(mesh):
    arguments = _place(_arguments(), mesh, *carriers)
    ids = jax.device_put(
      _segment_ids(), jax.NamedSharding(mesh, P(carriers[0]))
    )
    compiled = _value_and_grad().lower(arguments, ids).compile()
    actual = compiled(arguments, ids)
  text = compiled.as_text()
  assert not re.search('all-gather|all-to-all|collective-permute', text)
  assert 'all-reduce' in text  # The loss: collectives are called this here.
  _assert_close(actual, _on_one_device())
  (_, (o, state)), gradients = actual
  batch, heads = carriers
  if kind == EXPLICIT:
    assert o.sharding.spec == P(batch, None, heads, None)
    assert state.sharding.spec == P(batch, heads, None, None)
  for name, gradient in gradients.items():
    assert gradient.sharding.is_equivalent_to(
      arguments[name].sharding, gradient.ndim
    )


@for_each_kind
def test_a_vjp_of_its_own_and_absent_arguments(kind):
  mesh = _mesh((4, 2), ('data', 'model'), kind)
  arguments = _arguments()
  del arguments['g']
  with jax.set_mesh(mesh):
    arguments = _place(arguments, mesh, 'data', 'model') | {'g': None}
    actual = _value_and_grad('xla')(arguments)
  _assert_close(actual, _on_one_device('xla', segments=False))


@for_each_kind
def test_vmap_remat_and_no_jit(kind):
  mesh = _mesh((2, 2), ('data', 'model'), kind)
  expected = _on_one_device()[1]
  with jax.set_mesh(mesh):
    placed = _place(_arguments(), mesh, 'data', 'model')
    results = delta_rule(
      **placed, segment_ids=_segment_ids(), implementation='recurrent'
    )
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), placed)

    def gradient(arguments):
      loss = jax.checkpoint(lambda a: _loss(a, _segment_ids())[0])
      return jax.grad(loss)(arguments)

    gradients = jax.jit(jax.vmap(gradient))(stacked)
  _assert_close(results, _on_one_device()[0][1])
  _assert_close(jax.tree.map(lambda a: a[0], gradients), expected)


def test_vmap_over_an_axis_that_is_sharded():
  mesh = _mesh((2, 2), ('data', 'model'), EXPLICIT)
  stacked = jax.tree.map(lambda a: np.stack([a, a]), _arguments())
  sharding = jax.NamedSharding(mesh, P('data'))
  ids = _segment_ids()
  with jax.set_mesh(mesh):
    results = jax.jit(jax.vmap(lambda a: _loss(a, ids)[1]))(
      jax.device_put(stacked, sharding)
    )
  assert results[0].sharding.spec[0] == 'data'
  _assert_close([np.asarray(r)[1] for r in results], _on_one_device()[0][1])


@pytest.mark.parametrize(
  ('manual', 'kind'),
  [
    (('data', 'model'), AUTO),
    (('data',), AUTO),
    (('data',), EXPLICIT),
    (('model',), EXPLICIT),
  ],
)
def test_inside_the_shard_map_of_a_caller(manual, kind):
  mesh = _mesh((4, 2), ('data', 'model'), kind)
  batch, heads = (name if name in manual else None for name in mesh.axis_names)
  specs = {n: P(batch, None, heads) for n in _arguments()}
  specs['initial_state'] = P(batch, heads)

  def local(arguments, ids):
    return _loss(arguments, ids)[1]

  def loss(arguments, ids):
    results = jax.shard_map(
      local,
      in_specs=(specs, P(batch)),
      out_specs=(P(batch, None, heads), P(batch, heads)),
      axis_names=set(manual),
      check_vma=set(manual) == set(mesh.axis_names),
    )(arguments, ids)
    weights = (jnp.cos(jnp.arange(r.size)).reshape(r.shape) for r in results)
    total = sum(jnp.sum(r * w) for r, w in zip(results, weights, strict=True))
    return total, results

  with jax.set_mesh(mesh):
    arguments = _place(_arguments(), mesh, 'data', 'model')
    ids = jax.device_put(_segment_ids(), jax.NamedSharding(mesh, P('data')))
    actual = jax.jit(jax.value_and_grad(loss, has_aux=True))(arguments, ids)
  _assert_close(actual, _on_one_device())


def _local_call(mesh, shapes, *, shardings=None):
  """Returns the local shapes and time axes that a body is called with."""
  seen = {}

  def body(arrays, time_axes):
    seen['shapes'] = {
      n: None if a is None else a.shape for n, a in arrays.items()
    }
    seen['time_axes'] = time_axes
    return (arrays['q'],)

  axes = {'q': 'B T H K', 'v': 'B T HV V', 'g': 'B T HV K', 'w': 'K V'}
  with jax.set_mesh(mesh):

    def call():
      arrays = {n: s if s is None else jnp.zeros(s) for n, s in shapes.items()}
      for name, spec in (shardings or {}).items():
        arrays[name] = jax.sharding.reshard(arrays[name], spec)
      arguments = {n: (a, axes[n]) for n, a in arrays.items()}
      return sharded_call.sharded_call(body, arguments, ('B T H K',))

    (q,) = jax.eval_shape(call)
  assert q.shape == shapes['q']
  return seen['shapes'], seen['time_axes']


SHAPES = {
  'q': (8, 6, 2, 5),
  'v': (8, 6, 4, 3),
  'g': (8, 6, 4),
  'w': (5, 3),
}


def test_without_a_mesh_the_body_is_called_as_it_is():
  def body(arrays, time_axes):
    return arrays, time_axes

  q = np.zeros((1, 2, 3, 4), np.float32)
  arguments = {'q': (q, 'B T H K'), 'g': (None, 'B T HV')}
  (arrays, time_axes) = sharded_call.sharded_call(body, arguments, ())
  assert arrays['q'] is q and arrays['g'] is None and time_axes is None


@pytest.mark.parametrize(
  ('names', 'sizes', 'q', 'v', 'time_axes'),
  [
    (('data',), (4,), (2, 6, 2, 5), (2, 6, 4, 3), None),
    (('dcn_data', 'data', 'fsdp'), (2, 2, 2), (1, 6, 2, 5), (1, 6, 4, 3), None),
    (('model',), (2,), (8, 6, 1, 5), (8, 6, 2, 3), None),
    # 4 value heads could be cut in 4, the 2 key heads could not.
    (('tensor',), (4,), (8, 6, 2, 5), (8, 6, 4, 3), None),
    # Each of the two divides the 2 key heads, both together do not.
    (('tensor', 'model'), (2, 2), (8, 6, 1, 5), (8, 6, 2, 3), None),
    (('sequence',), (3,), (8, 2, 2, 5), (8, 2, 4, 3), ('sequence',)),
    (('sequence',), (4,), (8, 6, 2, 5), (8, 6, 4, 3), None),
    (('sequence', 'model'), (2, 2), (8, 3, 1, 5), (8, 3, 2, 3), ('sequence',)),
    (('sequence',), (1,), (8, 6, 2, 5), (8, 6, 4, 3), None),
    (('expert',), (2,), (8, 6, 2, 5), (8, 6, 4, 3), None),
  ],
)
def test_names_carry_the_axes_of_an_auto_mesh(names, sizes, q, v, time_axes):
  shapes, axes = _local_call(_mesh(sizes, names, AUTO), SHAPES)
  assert shapes == {'q': q, 'v': v, 'g': v[:3], 'w': (5, 3)}
  assert axes == time_axes


@pytest.mark.parametrize(
  ('q_spec', 'v_spec', 'q', 'v', 'time_axes'),
  [
    (P(), P(), (8, 6, 2, 5), (8, 6, 4, 3), None),
    (P('a'), P(), (4, 6, 2, 5), (4, 6, 4, 3), None),
    (P(('a', 'b')), P('b'), (2, 6, 2, 5), (2, 6, 4, 3), None),
    (P('b', None, 'a'), P(None, 'a'), (4, 6, 1, 5), (4, 6, 2, 3), None),
    (P(None, 'b'), P(), (8, 3, 2, 5), (8, 3, 4, 3), ('b',)),
    (P(None, 'data'), P(), (8, 6, 2, 5), (8, 6, 4, 3), None),
    # The key and the value dimension are gathered, names mean nothing.
    (P(), P(None, None, None, 'data'), (8, 6, 2, 5), (8, 6, 4, 3), None),
  ],
)
def test_the_first_argument_decides_in_an_explicit_mesh(
  q_spec, v_spec, q, v, time_axes
):
  mesh = _mesh((2, 2, 1), ('a', 'b', 'data'), EXPLICIT)
  shardings = {'q': q_spec, 'v': v_spec}
  shapes, axes = _local_call(mesh, SHAPES, shardings=shardings)
  assert shapes == {'q': q, 'v': v, 'g': v[:3], 'w': (5, 3)}
  assert axes == time_axes


def test_a_sharded_key_dimension_is_gathered():
  mesh = _mesh((2,), ('a',), EXPLICIT)
  whole = SHAPES | {'q': (8, 6, 2, 4), 'w': None}
  spec = P(None, None, None, 'a')
  shapes, _ = _local_call(mesh, whole, shardings={'q': spec})
  assert shapes == whole


def test_auto_and_explicit_axes_add_up():
  mesh = _mesh((2, 2, 2), ('data', 'x', 'model'), AUTO, EXPLICIT, AUTO)
  shapes, axes = _local_call(mesh, SHAPES, shardings={'q': P('x')})
  assert shapes['q'] == (2, 6, 1, 5)
  assert shapes['v'] == (2, 6, 2, 3)
  assert axes is None
