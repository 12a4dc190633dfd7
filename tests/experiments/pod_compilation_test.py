"""Steps compiled for a slice of TPUs and for hosts of GPUs, with neither."""

import dataclasses
import os

import jax
import pytest

import deltanet_jax
from experiments import ahead_of_time
from experiments import chips
from experiments import config as config_lib
from experiments import pod_compilation
from experiments.training import mesh as mesh_lib
from experiments.training import train_step


@pytest.fixture
def compilers():
  """Skips where nothing can be compiled ahead of time; fails there in CI."""
  parts = ahead_of_time.PARTS + ahead_of_time.TPU_PARTS
  reason = ahead_of_time.missing(parts=parts)
  if reason:
    (pytest.fail if os.environ.get('CI') else pytest.skip)(reason)


def _config(batch_size=8, length=64, accumulation=1, mixer='attention', **mesh):
  return config_lib.TrainLMConfig(
    model=deltanet_jax.ModelConfig(
      vocab_size=256,
      model_width=128,
      num_layers=2,
      num_heads=2,
      mlp_width=256,
      mixers=(mixer,),
    ),
    data=config_lib.DataConfig(batch_size=batch_size, sequence_length=length),
    training=config_lib.TrainingConfig(
      num_steps=2000, gradient_accumulation_steps=accumulation
    ),
    mesh=config_lib.MeshConfig(**mesh),
  )


@pytest.mark.usefixtures('compilers')
@pytest.mark.parametrize(
  ('target', 'mixer'),
  [
    ('v5e:2x4', 'delta_net'),
    ('h200:8', 'attention'),
    # A minute for the kernels, which tests of their own compile every time.
    pytest.param('h200:8', 'delta_net', marks=pytest.mark.drill),
  ],
)
def test_a_step_is_compiled_for_a_machine_that_is_not_there(target, mixer):
  row = pod_compilation.report(target, _config(mixer=mixer))
  assert row['num_chips'] == row['mesh']['fsdp'] == 8
  assert row['fits'] and not row['advice']
  # Of 128 x 128, the MLP's and the vocabulary's matrices an eighth, in float32.
  matrices = 2 * (4 * 128**2 + 3 * 128 * 256) + 2 * 256 * 128
  memory = row['memory']
  assert 4 * matrices / 8 <= memory['parameter_bytes'] < 4.4 * matrices / 8
  assert memory['optimizer_bytes'] == pytest.approx(
    2 * memory['parameter_bytes'], rel=0.01
  )
  assert memory['argument_bytes'] >= 3 * memory['parameter_bytes']
  assert memory['total_bytes'] > memory['temp_bytes'] > 0
  # The formula counts chunks of 32 tokens, and half the square of attention.
  assert 0.95 < row['flops'] / row['model_flops'] < 1.1
  sent = {(x['kind'], *x['axes']): x['bytes'] for x in row['collectives']}
  # A block's matrices are gathered forward and backward, as bfloat16.
  blocks = matrices - 2 * 256 * 128
  least = 2 * 2 * blocks * 7 / 8
  assert least <= sum(sent.values()) < 5 * least
  assert {axis for _, *axes in sent for axis in axes} == {'fsdp'}
  assert row['estimate']['is_estimate']
  assert 0 < row['estimate']['mfu'] < 1


@pytest.mark.parametrize(
  ('batch_size', 'accumulation', 'fsdp', 'sequence'),
  [(512, 1, 64, 1), (32, 1, 32, 2), (32, 4, 8, 8), (3, 1, 1, 64)],
)
def test_all_chips_share_rows_then_tokens(
  batch_size, accumulation, fsdp, sequence
):
  config = _config(batch_size, 64, accumulation)
  mesh = pod_compilation.with_mesh(config, chips.target('h200:64')).mesh
  assert (mesh.data, mesh.fsdp, mesh.sequence) == (1, fsdp, sequence)


def test_a_mesh_that_is_given_stays():
  config = _config(tensor=2)
  assert pod_compilation.with_mesh(config, chips.target('h200:8')) is config


def test_a_mesh_that_does_not_fit_the_machine_is_refused():
  with pytest.raises(ValueError, match='axes of mesh take 16 devices'):
    pod_compilation.report('h200:8', _config(batch_size=16, fsdp=16))


def test_activations_grow_with_rows_and_shrink_with_remat_and_shares():
  found = pod_compilation.activation_bytes
  whole = found(_config(8, data=1))
  assert found(_config(16, data=1)) == 2 * whole
  assert found(_config(8, data=1, fsdp=2, sequence=2)) == whole / 4
  assert found(_config(8, accumulation=2, data=1)) == whole / 2
  # A block keeps its input [rows, T, D] in bfloat16, the loss its gradient.
  config = _config(8, data=1)
  model = dataclasses.replace(config.model, remat='full')
  kept = found(dataclasses.replace(config, model=model))
  assert 3 * 8 * 64 * 128 * 2 <= kept < whole / 4


@pytest.mark.parametrize(
  ('need', 'remat'),
  [
    ({'none': 90, 'dots': 50, 'mixer': 20, 'full': 10}, 'none'),
    ({'none': 120, 'dots': 90, 'mixer': 20, 'full': 10}, 'dots'),
    ({'none': 400, 'dots': 120, 'mixer': 300, 'full': 200}, 'full'),
  ],
)
def test_the_policy_that_keeps_most_is_the_first_that_fits(
  monkeypatch, need, remat
):
  # GiB of a chip with 95; what is kept alone is a quarter of what is needed.
  tried = []

  def taken(run, machine, mesh):
    tried.append(run.model.remat)
    row = {'memory': {'total_bytes': need[run.model.remat] * GIB}}
    return row | {'remat': run.model.remat}

  def kept(run):
    return need[run.model.remat] / 4 * GIB

  state = {'params': {}, 'optimizer': {}}
  monkeypatch.setattr(ahead_of_time, 'devices', lambda machine: [])
  monkeypatch.setattr(mesh_lib, 'build', lambda config, devices: None)
  monkeypatch.setattr(train_step, 'abstract_state', lambda run, mesh: state)
  monkeypatch.setattr(pod_compilation, 'activation_bytes', kept)
  monkeypatch.setattr(pod_compilation, '_taken_stock_of', taken)
  config = config_lib.to_dict(_config(batch_size=64))
  row = pod_compilation.compile_step('v5p:4x4x4', config, choose_remat=True)
  assert row['remat'] == tried[-1] == remat
  # What would not even leave room for its parts is not compiled.
  assert ('none' in tried) == (need['none'] < 4 * 0.7 * 95)
  tried.clear()
  row = pod_compilation.compile_step('v5p:4x4x4', config, choose_remat=False)
  assert tried == ['none']


GIB = 2**30
MESH = {'dcn_data': 1, 'data': 1, 'fsdp': 8, 'sequence': 1, 'tensor': 1}


@pytest.mark.parametrize(
  ('memory', 'mesh', 'remat', 'message'),
  [
    ({'total': 8}, {}, 'none', ''),
    ({'total': 20, 'parameter': 4}, {}, 'none', 'raise mesh.tensor'),
    ({'total': 20, 'parameter': 4}, {'fsdp': 1}, 'none', 'raise mesh.fsdp'),
    (
      {'total': 20, 'parameter': 4},
      {'fsdp': 1, 'sequence': 8},
      'none',
      'raise mesh.tensor',
    ),
    (
      {'total': 20, 'parameter': 4},
      {'fsdp': 1, 'sequence': 4, 'tensor': 2},
      'none',
      'raise mesh.fsdp or sequence',
    ),
    ({'total': 20, 'activation': 9}, {}, 'none', 'model.remat=dots'),
    ({'total': 20, 'activation': 9}, {}, 'mixer', 'model.remat=full'),
    ({'total': 20, 'activation': 9}, {}, 'full', 'one row alone: raise mesh.s'),
    (
      {'total': 20, 'activation': 9},
      {'fsdp': 4},
      'full',
      'gradient_accumulation_steps or mesh.fsdp',
    ),
  ],
)
def test_advice_where_memory_is_short(memory, mesh, remat, message):
  sizes = {'parameter': 1, 'optimizer': 2, 'activation': 1, 'chip': 16}
  sizes = {f'{n}_bytes': s * GIB for n, s in (sizes | memory).items()}
  row = {'memory': sizes, 'mesh': MESH | mesh, 'remat': remat}
  found = pod_compilation.advice(row, _config(8))
  assert found.endswith(message) if not message else message in found


def test_what_the_compiler_for_tpus_lacks_is_read():
  error = jax.errors.JaxRuntimeError(
    'RESOURCE_EXHAUSTED: the total memory required for HLO temporaries '
    '(121.75G) exceeds available HBM (95.73G).'
  )
  assert pod_compilation._needed_bytes(error) == 121.75 * GIB


def test_another_error_of_the_compiler_stays():
  error = jax.errors.JaxRuntimeError('INTERNAL: odd')
  with pytest.raises(jax.errors.JaxRuntimeError, match='odd'):
    pod_compilation._needed_bytes(error)
