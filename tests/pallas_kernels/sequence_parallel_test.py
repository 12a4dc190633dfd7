import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels import delta_product
from pallas_kernels import delta_rule
from pallas_kernels import dispatch
from pallas_kernels import sequence_parallel
from pallas_kernels import sharded_call
from pallas_kernels.delta_rule import arg_specs
from tests import testing

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit

# Rows of segment ids over 24 tokens: parts of 12, 8, 6 and 3 tokens on 2, 3, 4
# and 8 devices.
_PATTERNS = (
  'a' * 24,  # one segment
  'aaabbbcccdddeeefffggghhh',  # a reset at every boundary
  'aaabbbbbbbcaaaaaaaaaaaaa',  # resets inside, an id that comes back
  'aaaaaaaaaaaabbbbbbbbbbbb',  # only at the middle
  '............aaaaaaaaaaaa',  # the first half is padding
  'aaaaaa............bbbbbb',  # parts of padding, then another segment
  'aaaaaa............aaaaaa',  # the same segment goes on after padding
  'ab.' * 8,  # padding ends every part
  '.' * 24,
  'aaaaaaaaaaa.aaaaaaaaaaa.',
  '.......a................',
  'abcdefghijklmnopqrstuvwx',
)
IDS = np.array(
  [[0 if c == '.' else ord(c) - 96 for c in row] for row in _PATTERNS], np.int32
)
SPEC = arg_specs.ArgSpec(name='base', B=len(IDS), T=24, H=2, HV=4, K=4, V=3)
# Parts of 150 tokens on 4 devices: several groups of chunks, the last padded.
LONG = dataclasses.replace(SPEC, B=2, T=600)
DECAYS = {'none': None, 'head': (), 'channel': (SPEC.K,)}


def _mesh(shape, names, kind):
  devices = jax.devices()[: math.prod(shape)]
  kinds = (kind,) * len(names)
  return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)


def _arguments(decay='none', spec=SPEC, dtype='float32'):
  rng = np.random.default_rng(2)
  state = rng.standard_normal((spec.B, spec.HV, spec.K, spec.V))
  arguments = {
    name: array.astype(dtype)
    for name, array in arg_specs.random_arguments(spec, seed=3).items()
  }
  arguments['initial_state'] = jnp.asarray(state, jnp.float32)
  if decay != 'none':
    shape = (spec.B, spec.T, spec.HV, *DECAYS[decay])
    g = -0.2 * np.abs(rng.standard_normal(shape))
    arguments['g'] = jnp.asarray(g, jnp.float32)
  return arguments


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


@functools.cache
def _value_and_grad(implementation):
  loss = functools.partial(_loss, implementation=implementation)
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def _on_one_device(decay, implementation='recurrent', *, segments=True):
  ids = jnp.asarray(IDS) if segments else None
  return _value_and_grad(implementation)(_arguments(decay), ids)


def _place(arguments, mesh, *, batch=None, time='sequence', heads=None):
  return {
    name: jax.device_put(
      array,
      jax.NamedSharding(
        mesh,
        P(batch, heads) if name == 'initial_state' else P(batch, time, heads),
      ),
    )
    for name, array in arguments.items()
  }


def _row_errors(actual, expected):
  """Returns the greatest error of any result or gradient, by row."""
  (_, values), gradients = actual
  (_, expected_values), expected_gradients = expected
  pairs = [
    *zip(values, expected_values, strict=True),
    *((gradients[n], expected_gradients[n]) for n in expected_gradients),
  ]
  assert len(gradients) == len(expected_gradients)
  pairs = [(np.float64(a), np.float64(e)) for a, e in pairs]
  # A gradient that cancels is measured by its greatest row.
  return np.array(
    [
      max(np.linalg.norm(a[row] - e[row]) / np.abs(e).max() for a, e in pairs)
      for row in range(len(expected_values[0]))
    ]
  )


def _check(mesh, decay='none', implementation='recurrent', *, ids=IDS, **axes):
  expected = _on_one_device(decay, implementation, segments=ids is not None)
  with jax.set_mesh(mesh):
    arguments = _place(_arguments(decay), mesh, **axes)
    actual = _value_and_grad(implementation)(arguments, ids)
  errors = _row_errors(actual, expected)
  assert np.all(errors < 1e-5), errors
  return actual


# One that knows of no other devices, and one that takes an `Exchange`.
BOTH = pytest.mark.parametrize('implementation', ['recurrent', 'xla'])


@BOTH
@pytest.mark.parametrize(
  ('devices', 'kind', 'decay'),
  [
    (2, AUTO, 'head'),
    (3, EXPLICIT, 'none'),
    (4, AUTO, 'channel'),
    (8, EXPLICIT, 'head'),
    (8, AUTO, 'none'),
  ],
)
def test_values_and_gradients_with_segments(
  devices, kind, decay, implementation
):
  mesh = _mesh((devices,), ('sequence',), kind)
  (_, (o, state)), _ = _check(mesh, decay, implementation)
  if kind == EXPLICIT:
    assert o.sharding.spec == P(None, 'sequence', None, None)
  assert state.sharding.is_fully_replicated
  for shard in state.addressable_shards:
    np.testing.assert_array_equal(shard.data, state)


@pytest.mark.parametrize(('devices', 'kind'), [(3, AUTO), (4, EXPLICIT)])
def test_a_vjp_of_its_own_and_parts_that_are_no_whole_chunks(devices, kind):
  _check(_mesh((devices,), ('sequence',), kind), implementation='xla', ids=None)


@pytest.mark.parametrize('decay', DECAYS)
def test_parts_of_several_groups_of_chunks(decay):
  rng = np.random.default_rng(7)
  ids = np.sort(rng.integers(0, 5, (LONG.B, LONG.T)), axis=1).astype(np.int32)
  arguments = _arguments(decay, LONG)
  expected = _value_and_grad('xla')(arguments, ids)
  with jax.set_mesh(_mesh((4,), ('sequence',), AUTO)):
    actual = _value_and_grad('xla')(arguments, ids)
  errors = _row_errors(actual, expected)
  assert np.all(errors < 1e-5), errors


@pytest.mark.parametrize(
  ('shape', 'names', 'axes'),
  [
    ((2, 2, 2), ('data', 'sequence', 'tensor'), ('data', 'sequence', 'tensor')),
    ((4, 2), ('sequence', 'model'), (None, 'sequence', 'model')),
    ((2, 2, 2), ('a', 'b', 'c'), ('b', ('c', 'a'), None)),
  ],
)
def test_beside_batch_and_heads(shape, names, axes):
  kind = EXPLICIT if 'a' in names else AUTO
  batch, time, heads = axes
  mesh = _mesh(shape, names, kind)
  _check(mesh, 'head', batch=batch, time=time, heads=heads)


@BOTH
def test_16_bit_arguments(implementation):
  """What a token reads is the sum of two numbers that were rounded to 16 bits.

  Rounding one to bfloat16 has an rms error of 2^-9 / sqrt(3) to 2^-8 / sqrt(3).
  """
  mesh = _mesh((4,), ('sequence',), AUTO)
  arguments = _arguments(dtype='bfloat16')
  run = jax.jit(functools.partial(delta_rule, implementation=implementation))
  expected = run(**arguments, segment_ids=IDS)
  with jax.set_mesh(mesh):
    actual = run(**_place(arguments, mesh), segment_ids=IDS)
  for a, e, most in zip(actual, expected, (4e-3, 1e-4), strict=True):
    assert a.dtype == e.dtype
    assert testing.error(np.float64(a), np.float64(e)) < most


def test_second_derivatives():
  """Of the sum of squares of a gradient, in reverse mode twice."""

  def squares(arguments):
    gradients = jax.grad(lambda a: _loss(a, IDS)[0])(arguments)
    return sum(jnp.sum(jnp.square(g)) for g in gradients.values())

  run = jax.jit(jax.grad(squares))
  expected = run(_arguments('head'))
  mesh = _mesh((4,), ('sequence',), AUTO)
  with jax.set_mesh(mesh):
    actual = run(_place(_arguments('head'), mesh))
  for name, e in expected.items():
    assert testing.error(np.float64(actual[name]), np.float64(e)) < 1e-5, name


@BOTH
def test_forward_mode_is_refused(implementation):
  mesh = _mesh((2,), ('sequence',), AUTO)
  arguments = _arguments()
  loss = lambda a: _loss(a, implementation=implementation)[0]  # noqa: E731
  with jax.set_mesh(mesh), pytest.raises(TypeError, match='forward-mode'):
    jax.jvp(loss, (arguments,), (arguments,))


def test_second_derivatives_of_chunks_are_refused():
  def norm(arguments):
    gradients = jax.grad(lambda a: _loss(a, implementation='xla')[0])(arguments)
    return sum(jnp.sum(jnp.square(g)) for g in gradients.values())

  with (
    jax.set_mesh(_mesh((2,), ('sequence',), AUTO)),
    pytest.raises(NotImplementedError, match='first derivatives'),
  ):
    jax.grad(norm)(_arguments())


@BOTH
def test_rows_of_an_axis_that_is_mapped(implementation):
  loss = lambda a: _loss(a, implementation=implementation)[0]  # noqa: E731
  run = jax.jit(jax.vmap(jax.grad(loss)))
  arguments = jax.tree.map(lambda x: jnp.stack([x, -x]), _arguments())
  expected = run(arguments)
  with jax.set_mesh(_mesh((4,), ('sequence',), AUTO)):
    actual = run(arguments)
  for name, e in expected.items():
    assert testing.error(np.float64(actual[name]), np.float64(e)) < 1e-5, name


@BOTH
def test_several_keys_per_token(implementation):
  arguments = _arguments('head')
  rng = np.random.default_rng(6)
  for name in ('k', 'v', 'beta'):
    shape = arguments[name].shape
    wide = rng.standard_normal((*shape[:2], 3, *shape[2:]))
    arguments[name] = jnp.asarray(wide, jnp.float32)
  arguments['beta'] = 2 * jax.nn.sigmoid(arguments['beta'])

  def loss(arguments):
    results = delta_product(
      **arguments,
      segment_ids=IDS,
      normalize_qk=True,
      chunk_size=6,
      implementation=implementation,
    )
    return sum(jnp.sum(jnp.sin(r)) for r in results), results

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  expected = run(arguments)
  with jax.set_mesh(_mesh((4,), ('sequence',), AUTO)):
    actual = run(arguments)
  errors = _row_errors(actual, expected)
  assert np.all(errors < 1e-5), errors


_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|'
  r'reduce-scatter|collective-broadcast|send|recv)(-start)?\('
)


def _collectives(function, arguments, ids):
  """Returns (kind, shapes) of every collective of the compiled function."""
  text = jax.jit(function).lower(arguments, ids).compile().as_text()
  found = [_COLLECTIVE.search(line) for line in text.splitlines()]
  return sorted(
    (match[2], tuple(re.findall(r'\w+\[[\d,]*\]', match[1])))
    for match in found
    if match
  )


@BOTH
@pytest.mark.parametrize(('devices', 'rounds'), [(2, 1), (4, 2), (8, 3)])
def test_only_states_are_exchanged(devices, rounds, implementation):
  spec = arg_specs.ArgSpec(name='wide', B=2, T=48, H=1, HV=3, K=5, V=7)
  mesh = _mesh((devices,), ('sequence',), AUTO)
  affine = ('collective-permute', ('f32[2,3,5,12]',))  # [B, HV, K, V + K]
  first_and_last_id = ('collective-permute', ('s32[2]',))
  final_state = ('all-reduce', ('f32[2,3,5,7]',))

  def outputs(arguments, ids):
    return delta_rule(
      **arguments, segment_ids=ids, implementation=implementation
    )

  def output(arguments, ids):
    return outputs(arguments, ids)[0]

  def cotangents(arguments, ids):
    o, pullback = jax.vjp(lambda a: outputs(a, ids), arguments)
    return pullback(o)

  with jax.set_mesh(mesh):
    arguments = _place(_arguments(spec=spec), mesh)
    ids = jax.device_put(
      np.ones((2, 48), np.int32), jax.NamedSharding(mesh, P(None, 'sequence'))
    )
    forward = _collectives(output, arguments, None)
    assert forward == [affine] * rounds
    both = _collectives(outputs, arguments, ids)
    id_rounds = [first_and_last_id] * (2 * rounds - 1)
    assert both == [final_state, *[affine] * rounds, *id_rounds]
    # One more sum for the gradient of the initial state, all devices' own.
    backward = _collectives(cotangents, arguments, None)
  kinds = [kind for kind, _ in backward]
  assert kinds.count('collective-permute') == 2 * rounds
  assert set(kinds) == {'collective-permute', 'all-reduce'}
  permuted = [s for k, s in backward if k == 'collective-permute']
  assert permuted == [affine[1]] * (2 * rounds)
  summed = [s for k, shapes in backward if k == 'all-reduce' for s in shapes]
  assert set(summed) == {'f32[2,3,5,7]'}
  assert len(summed) <= 3


def _scans_and_exchanges(function):
  """Returns how often tokens are scanned, and states are exchanged."""
  run = jax.jit(jax.value_and_grad(function))
  text = run.lower(_arguments(spec=LONG)).compile().as_text()
  return len(re.findall(r' while\(', text)), text.count(' collective-permute(')


@BOTH
def test_with_the_states_kept_only_the_op_runs_again(implementation):
  policy = jax.checkpoint_policies.save_only_these_names(
    sequence_parallel.STATES
  )

  def loss(arguments):
    return _loss(arguments, implementation=implementation)[0]

  with jax.set_mesh(_mesh((4,), ('sequence',), AUTO)):
    scans, exchanges = _scans_and_exchanges(loss)
    found = _scans_and_exchanges(jax.checkpoint(loss, policy=policy))
  assert exchanges == 2 * 2  # Rounds of each pass.
  assert found == (scans + 1, exchanges)


def test_chunks_are_gone_through_once_in_each_direction():
  def loss(arguments):
    return _loss(arguments, implementation='xla')[0]

  assert _scans_and_exchanges(loss) == (1 + 1, 0)
  with jax.set_mesh(_mesh((2,), ('sequence',), AUTO)):
    assert _scans_and_exchanges(loss) == (1 + 1, 1 + 1)


def _decayed_sum(q, k, v, g, *, initial_state, segment_ids):
  """S_t = exp(g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, without segments."""
  assert segment_ids is None

  def step(state, token):
    q, k, v, g = token
    state = jnp.exp(g)[..., None] * state + k[..., None] * v[..., None, :]
    return state, jnp.einsum('bhk,bhkv->bhv', q, state)

  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g))
  state, o = jax.lax.scan(step, initial_state, tokens)
  return jnp.moveaxis(o, 0, 1), state


def _decayed_sums():
  """Returns arguments of `_decayed_sum`, [B, T, H, K] = [2, 10, 3, 4], V 5."""
  rng = np.random.default_rng(4)
  shapes = dict.fromkeys(('q', 'k', 'v', 'g'), (2, 10, 3, 4))
  shapes |= {'v': (2, 10, 3, 5), 'initial_state': (2, 3, 4, 5)}
  arrays = {
    n: jnp.asarray(rng.standard_normal(s), jnp.float32)
    for n, s in shapes.items()
  }
  return arrays | {'g': -jnp.abs(arrays['g']), 'segment_ids': None}


def _run_decayed_sum(arrays, function):
  """Returns the results of an implementation with the call's own sharding."""
  scan = dispatch.Implementation(name='scan', function=function)
  axes = dict.fromkeys(('q', 'k', 'g'), 'B T H K')
  axes |= {'v': 'B T H V', 'initial_state': 'B H K V', 'segment_ids': 'B T'}
  return sharded_call.sharded_call(
    sequence_parallel.linear_recurrence(
      dispatch.Op('decayed_sum', (scan,)), None
    ),
    {name: (arrays[name], axes[name]) for name in axes},
    ('B T H V', 'B H K V'),
  )


def test_any_linear_recurrence():
  run = jax.jit(functools.partial(_run_decayed_sum, function=_decayed_sum))
  expected = run(_decayed_sums())
  with jax.set_mesh(_mesh((5,), ('sequence',), AUTO)):
    actual = run(_decayed_sums())
  for a, e in zip(actual, expected, strict=True):
    assert testing.error(np.float64(a), np.float64(e)) < 1e-6


def test_of_the_map_of_a_part_no_gradient_is_taken():
  forward, backward = set(), set()

  @jax.custom_vjp
  def watch(v):
    forward.add(v.shape[-1])
    return v

  def note(_, dv):
    backward.add(dv.shape[-1])
    return (dv,)

  watch.defvjp(lambda v: (watch(v), None), note)

  def watched(q, k, v, g, **options):
    return _decayed_sum(q, k, watch(v), g, **options)

  def loss(v):
    arrays = _decayed_sums() | {'v': v}
    o, state = _run_decayed_sum(arrays, watched)
    return jnp.sum(o) + jnp.sum(state)

  with jax.set_mesh(_mesh((2,), ('sequence',), AUTO)):
    jax.grad(loss)(_decayed_sums()['v'])
  assert (forward, backward) == ({5, 9}, {5})


@pytest.mark.parametrize('size', [1, 3, 4, 5, 12, 15])
@pytest.mark.parametrize('kind', ['ids', 'tokens'])
def test_halo(kind, size):
  x = np.arange(1, 25, dtype=np.int32).reshape(2, 12)
  x = x if kind == 'ids' else np.float32(x[..., None] * [1, -1])
  halo = functools.partial(sequence_parallel.halo, size=size, axes='sequence')
  with jax.set_mesh(_mesh((3,), ('sequence',), AUTO)):
    specs = {'in_specs': P(None, 'sequence'), 'out_specs': P(None, 'sequence')}
    halos = jax.shard_map(halo, **specs, check_vma=False)(x)
  before = np.pad(x, [(0, 0), (size, 0), (0, 0)][: x.ndim])
  expected = [before[:, start : start + size] for start in (0, 4, 8)]
  np.testing.assert_array_equal(halos, np.concatenate(expected, axis=1))
  assert halos.dtype == x.dtype


def test_a_convolution_with_a_halo():
  rng = np.random.default_rng(5)
  x = jnp.asarray(rng.standard_normal((2, 16, 4)), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)

  def convolve(arrays, axes):
    x, kernel = arrays['x'], arrays['kernel']
    past = jnp.zeros_like(x[:, :2])
    if axes is not None:
      past = sequence_parallel.halo(x, 2, axes)
    x = jnp.concatenate([past, x], axis=1)
    taps = [
      x[:, i : i + x.shape[1] - 2] * kernel[None, None, i] for i in range(3)
    ]
    return (sum(taps),)

  def loss(x, kernel):
    arguments = {'x': (x, 'B T H'), 'kernel': (kernel, 'W H')}
    (y,) = sharded_call.sharded_call(convolve, arguments, ('B T H',))
    return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

  run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  expected = jax.jit(run)(x, kernel)
  with jax.set_mesh(_mesh((4, 2), ('sequence', 'tensor'), AUTO)):
    actual = jax.jit(run)(x, kernel)
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert testing.error(np.float64(a), np.float64(e)) < 1e-6
