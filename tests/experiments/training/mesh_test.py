"""The train step on eight devices against the one on a single device."""

import collections
import dataclasses
import functools
import itertools
import re
import types

import jax
import numpy as np
import pytest

import deltanet_jax
from deltanet_jax import mixers
from deltanet_jax import sharding
from deltanet_jax.layers import attention
from experiments import collectives
from experiments import config as config_lib
from experiments import hlo_text
from experiments import mesh_traffic
from experiments import program_costs
from experiments.training import checkpoints as checkpoints_lib
from experiments.training import mesh as mesh_lib
from experiments.training import train_step

# No parameter has it as a dimension.
TOKENS = 24
ALL_AXES = {'fsdp': 2, 'sequence': 2, 'tensor': 2}
MESHES = (
  {'data': 8},
  {'fsdp': 8},
  {'tensor': 8},
  {'sequence': 8},
  {'fsdp': 2, 'sequence': 4},
  # The 3 divides no parameter.
  {'fsdp': 2, 'sequence': 3},
  ALL_AXES,
  {'dcn_data': 2, 'data': 2, 'fsdp': 2},
)
FAMILY = ('delta_net', 'gated_delta_net', 'kimi_delta', 'delta_product')

pytestmark = pytest.mark.usefixtures('standard_promotion')


def config(mixer, accumulation=1, remat='none', **mesh):
  return config_lib.TrainLMConfig(
    model=deltanet_jax.ModelConfig(
      vocab_size=64,
      model_width=32,
      num_layers=1,
      num_heads=8,
      mlp_width=64,
      mixers=(mixer,),
      dtype='float32',
      remat=remat,
      sliding_window=attention.SlidingWindowConfig(window=3),
    ),
    data=config_lib.DataConfig(batch_size=8, sequence_length=TOKENS),
    optimizer=config_lib.OptimizerConfig(
      peak_learning_rate=1e-2, warmup_steps=1
    ),
    training=config_lib.TrainingConfig(
      gradient_accumulation_steps=accumulation
    ),
    mesh=config_lib.MeshConfig(**{'data': 1} | mesh),
  )


def _batch(run, mesh):
  draw = np.random.default_rng(0)
  shape = (run.data.batch_size, run.data.sequence_length + 1)
  segment_ids = np.cumsum(draw.random(shape) < 0.2, axis=1) + 1
  segment_ids[:3, -4:] = 0
  batch = {
    'tokens': draw.integers(64, size=shape, dtype=np.int32),
    'segment_ids': segment_ids.astype(np.int32),
  }
  return jax.device_put(batch, mesh_lib.batch_sharding(mesh))


@functools.cache
def _trained(mixer, accumulation, remat, mesh_items):
  """Returns the losses of three steps, the state and the compiled text."""
  run = config(mixer, accumulation, remat, **dict(mesh_items))
  mesh = mesh_lib.build(run)
  state, batch = train_step.build_init(run, mesh)(), _batch(run, mesh)
  # It runs three times.
  step = (
    train_step.build(run, mesh)
    .lower(state, batch)
    .compile(compiler_options={'xla_backend_optimization_level': 0})
  )
  losses = []
  for _ in range(3):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  return losses, state, step.as_text()


def trained(mixer, accumulation=1, remat='none', **mesh):
  return _trained(mixer, accumulation, remat, tuple(mesh.items()))


def gathered_activations(text, params):
  """Returns the shapes that gathers and exchanges make of activations.

  Those of three dimensions or more that are not a parameter's, of all layers or
  of one, whole or a part along `tensor`.
  """
  known = set()
  for leaf in jax.tree.leaves(params):
    entries = (e if e == 'tensor' else None for e in leaf.sharding.spec)
    gathered = jax.NamedSharding(leaf.sharding.mesh, jax.P(*entries))
    for shape in leaf.shape, gathered.shard_shape(leaf.shape):
      known |= {shape, shape[1:]}
  shapes = re.findall(
    r'= \(?(?:f32|bf16)\[([\d,]+)\]\S* (?:all-gather|all-to-all)\S*\(', text
  )
  found = [tuple(map(int, shape.split(','))) for shape in shapes]
  return [x for x in found if len(x) > 2 and x not in known]


class _Chip(types.SimpleNamespace):
  """A TPU chip of a torus, by what JAX arranges devices by."""

  platform, device_kind = 'tpu', 'TPU v5'
  process_index, core_on_chip = 0, 0


@pytest.mark.parametrize(
  ('num_slices', 'sizes'),
  [(1, {'fsdp': 32, 'sequence': 2}), (1, {'fsdp': 8, 'sequence': 8})]
  + [(2, {'fsdp': 32, 'tensor': 2})],
)
def test_axes_need_not_be_whole_axes_of_a_torus(num_slices, sizes):
  chips = [
    _Chip(id=64 * n + i, coords=coords, slice_index=n)
    for n in range(num_slices)
    for i, coords in enumerate(itertools.product(range(4), repeat=3))
  ]
  shape = dict.fromkeys(mesh_lib.AXES, 1) | {'dcn_data': num_slices} | sizes
  found = mesh_lib.arrange(shape, chips)
  assert found.shape == tuple(shape.values())
  assert {chip.id for chip in found.flat} == set(range(64 * num_slices))


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_losses_are_those_of_one_device(mesh):
  expected, _, _ = trained('delta_net')
  losses, state, text = trained('delta_net', **mesh)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert not gathered_activations(text, state['params'])
  if not set(mesh) & set(sharding.SHARDS):
    assert 'all-gather' not in text


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_of_a_shared_row_changes_no_loss(remat):
  expected, _, _ = trained('delta_net')
  losses, _, _ = trained('delta_net', remat=remat, sequence=8)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.drill
@pytest.mark.parametrize('mesh', MESHES, ids=str)
@pytest.mark.parametrize('mixer', [*FAMILY, 'attention', 'sliding_window'])
def test_losses_of_the_family_are_those_of_one_device(mixer, mesh):
  expected, _, _ = trained(mixer)
  losses, state, text = trained(mixer, **mesh)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert not gathered_activations(text, state['params'])


# One of each kind of computation; the others in drills.
QUICK = ('gla', 'gsa', 'hyena', 'mamba', 'rwkv6')


@pytest.mark.parametrize(
  'mixer',
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.drill)
    for name in mixers.MIXERS
    if name not in FAMILY
  ],
)
def test_every_mixer_trains_under_fsdp(mixer):
  expected, _, _ = trained(mixer)
  losses, state, text = trained(mixer, fsdp=8)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert not gathered_activations(text, state['params'])
  assert largest_share(state['params']) < 1


def largest_share(params):
  """Returns the part of the largest leaf that a device holds."""
  leaf = max(jax.tree.leaves(params), key=lambda x: x.size)
  return leaf.addressable_shards[0].data.size / leaf.size


@pytest.mark.parametrize('mixer', ['sliding_window', 'delta_product'])
def test_all_axes_at_once(mixer):
  losses, state, text = trained(mixer, 2, **ALL_AXES)
  np.testing.assert_allclose(losses, trained(mixer)[0], rtol=1e-5)
  assert not gathered_activations(text, state['params'])


@pytest.mark.parametrize('axis', ['data', 'fsdp', 'tensor', 'sequence'])
def test_a_step_sends_what_the_formula_says(axis):
  run = config('delta_net', **{axis: 8})
  _, _, text = trained('delta_net', **{axis: 8})
  found = collectives.collectives(text, mesh_lib.build(run))
  assert {one.axes for one in found} == {(axis,)}
  sent = sum(one.total_bytes_per_device for one in found)
  assert sent == pytest.approx(mesh_traffic.sent_bytes(run, axis, 8), rel=0.01)


@pytest.mark.parametrize(
  'mesh',
  [{'fsdp': 8}, {'sequence': 8}, {'fsdp': 2, 'sequence': 4}],
  ids=str,
)
def test_parameters_are_gathered_a_block_at_a_time(mesh):
  run = config('delta_net', **mesh)
  model = dataclasses.replace(run.model, num_layers=3)
  run = dataclasses.replace(run, model=model)
  devices = mesh_lib.build(run)
  state, batch = train_step.abstract_state(run, devices), _batch(run, devices)
  step = train_step.build(run, devices).lower(state, batch).compile()
  found, expected = collections.Counter(), collections.Counter()
  for one in collectives.collectives(step.as_text(), devices):
    if one.kind == 'all-gather':
      assert one.axes == tuple(mesh)
      found[one.bytes] += one.executions
  for name, tree in state['params'].items():
    for leaf in jax.tree.leaves(tree):
      if not leaf.sharding.is_fully_replicated:
        layers = 3 if name == 'blocks' else 1
        # A block's forward and backward.
        times = 2 * layers if name == 'blocks' else 1
        expected[4 * leaf.size // layers] += times
  assert found == expected


def test_devices_of_fsdp_share_the_products():
  counts = [
    program_costs.flops(hlo_text.parse(trained('delta_net', **mesh)[2]))
    for mesh in ({}, {'fsdp': 8})
  ]
  assert 8 * counts[1] == pytest.approx(counts[0], rel=0.05)


def test_a_planted_gather_of_activations_is_found(monkeypatch):
  def whole(x, name):
    if name != 'stream' or jax.sharding.get_abstract_mesh().empty:
      return x
    return jax.lax.with_sharding_constraint(x, jax.P())

  monkeypatch.setattr(sharding, 'constrain', whole)
  run = config('delta_net', sequence=2, tensor=2)
  mesh = mesh_lib.build(run)
  state, batch = train_step.abstract_state(run, mesh), _batch(run, mesh)
  text = train_step.build(run, mesh).lower(state, batch).compile().as_text()
  assert gathered_activations(text, state['params'])


@pytest.mark.parametrize(
  'mesh',
  [{'fsdp': 8}, {'sequence': 8}, {'fsdp': 2, 'sequence': 4}],
  ids=str,
)
def test_every_large_leaf_of_the_state_is_spread(mesh):
  _, state, _ = trained('delta_net', **mesh)
  spread = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    share = leaf.addressable_shards[0].data.size
    name = jax.tree_util.keystr(path)
    if (
      name.endswith("['kernel']")
      and '_conv' not in name
      or (name.endswith("['embedding']"))
    ):
      assert share * 8 == leaf.size, name
      spread += 1
  assert spread == 3 * 10  # Parameters and both moments of Adam.


def test_a_state_returns_on_another_mesh(tmp_path):
  _, saved, _ = trained('delta_net', sequence=8)
  settings = config_lib.CheckpointConfig()
  with checkpoints_lib.Checkpoints(tmp_path, settings) as checkpoints:
    checkpoints.save(3, saved, {})
  for sizes in ({'fsdp': 2, 'sequence': 4}, ALL_AXES, {}):
    run = config('delta_net', **sizes)
    wanted = train_step.abstract_state(run, mesh_lib.build(run))
    with checkpoints_lib.Checkpoints(tmp_path, settings) as checkpoints:
      found = checkpoints.restore(wanted).state
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    for leaf, shape in zip(
      jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True
    ):
      assert leaf.sharding == shape.sharding


def test_parameters_are_those_of_one_device():
  run = config('delta_net', **ALL_AXES)
  found = train_step.build_init(run, mesh_lib.build(run))()['params']
  expected = train_step.init_state(run)['params']
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
  ('num_devices', 'mesh', 'expected'),
  [
    (8, {'data': 0}, 8),
    (1, {'data': 0}, 1),
    (8, {'data': 0, 'fsdp': 2}, 4),
    (8, {'data': 0, 'tensor': 4}, 2),
    (6, {'data': 0}, 2),
    (8, {'data': 2}, 2),
  ],
)
def test_data_takes_the_devices_that_are_left(num_devices, mesh, expected):
  assert (
    mesh_lib.sizes(config('delta_net', **mesh), num_devices)['data'] == expected
  )


@pytest.mark.parametrize(
  ('mesh', 'accumulation', 'message'),
  [
    ({'fsdp': 16}, 1, 'take 16 devices'),
    ({'fsdp': 8}, 2, 'multiple of mesh.dcn_data'),
  ],
)
def test_what_does_not_fit_is_refused(mesh, accumulation, message):
  with pytest.raises(ValueError, match=message):
    mesh_lib.build(config('delta_net', accumulation, **mesh))
