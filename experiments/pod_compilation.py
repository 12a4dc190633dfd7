"""Compiles the train step for machines that are not there, and takes stock.

`report` starts a child process; what runs in it, `compile_step`, is called by
nobody else. Ops choose their implementations as on that machine: on GPUs of the
Hopper family the kernels of the delta rule where they cover the arguments, else
`xla`. Attention is that of XLA, not of cuDNN, which is not there to ask.

Memory, per chip: parameters and slots of the optimizer by their shardings,
temporary memory as the compiler planned it. Activations are the part of it that
the forward pass leaves for the backward pass: what the transposed program keeps
for one row more, times a chip's rows and its share of their tokens; what
`tensor` cuts counts whole.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

import deltanet_jax
from deltanet_jax import sharding
from experiments import ahead_of_time
from experiments import chips
from experiments import collectives
from experiments import config as config_lib
from experiments import hlo_text
from experiments import kernel_compilation
from experiments import model_flops
from experiments import program_costs
from experiments import result_rows
from experiments import roofline
from experiments.training import mesh as mesh_lib
from experiments.training import train_step

Row = dict[str, Any]

TIMEOUT_SECONDS = 3600.0
# From most memory to least, of those that no host memory is needed for.
REMAT = ('none', 'dots', 'mixer', 'full')
# Beside state, gradients and activations a step needs room to work.
_USABLE = 0.7
_NEEDED = re.compile(r'\(([\d.]+)([KMG]?)\) exceeds available HBM')
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30}
_KERNEL = 'custom_call_target="mosaic_gpu'
_ON_KERNELS = ('delta_net', 'gated_delta_net')


def with_mesh(
  config: config_lib.TrainLMConfig, target: chips.Target
) -> config_lib.TrainLMConfig:
  """Returns the config on all chips, if its mesh is the default one.

  As many chips as divide the rows share these (fsdp), the others the tokens of
  a row (sequence); all share the parameters.
  """
  if config.mesh != config_lib.MeshConfig():
    return config
  rows = config.data.batch_size // config.training.gradient_accumulation_steps
  fsdp = math.gcd(rows, target.num_chips)
  mesh = config_lib.MeshConfig(
    data=1, fsdp=fsdp, sequence=target.num_chips // fsdp
  )
  return dataclasses.replace(config, mesh=mesh)


def _share_bytes(tree: Any) -> int:
  """Returns the bytes that a chip holds of arrays with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  )


def _kept_bytes(config, rows: int) -> int:
  """Returns the bytes that the backward pass of so many rows is left."""
  shape = (rows, config.data.sequence_length + 1)
  window = jax.ShapeDtypeStruct(shape, jnp.int32)
  params = jax.eval_shape(
    lambda: deltanet_jax.init(config.model, jax.random.key(0))
  )

  def pullback(params, tokens, segment_ids):
    def loss(params):
      hidden, kernel = deltanet_jax.hidden_states(
        config.model, params, tokens[:, :-1], segment_ids=segment_ids[:, :-1]
      )
      weights = jnp.ones(hidden.shape[:2], jnp.float32)
      return deltanet_jax.summed_cross_entropy(
        hidden, kernel, tokens[:, 1:], weights
      )

    return jax.vjp(loss, params)[1]

  kept = jax.eval_shape(pullback, params, window, window)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def activation_bytes(config: config_lib.TrainLMConfig) -> int:
  """Returns the bytes of activations per chip; see the module."""
  per_row = _kept_bytes(config, 2) - _kept_bytes(config, 1)
  mesh = config.mesh
  rows = config.data.batch_size // config.training.gradient_accumulation_steps
  shares = mesh.dcn_data * mesh.data * mesh.fsdp * mesh.sequence
  return round(per_row * rows / shares)


def _by_remat(config, state_bytes: int, chip: chips.Chip):
  """Returns the config with every policy, from the first that leaves room."""
  configs = [
    dataclasses.replace(
      config, model=dataclasses.replace(config.model, remat=policy)
    )
    for policy in REMAT
  ]
  while len(configs) > 1:
    parts = state_bytes + activation_bytes(configs[0])
    if parts <= _USABLE * chip.memory_bytes:
      break
    del configs[0]
  return configs


def _compile(config, mesh, state):
  shape = (config.data.batch_size, config.data.sequence_length + 1)
  window = jax.ShapeDtypeStruct(
    shape, jnp.int32, sharding=mesh_lib.batch_sharding(mesh)
  )
  step = train_step.build(config, mesh)
  # Mosaic asks the default device for its architecture.
  with jax.default_device(mesh.devices.flat[0]):
    batch = {'tokens': window, 'segment_ids': window}
    return step.trace(state, batch).lower().compile()


def _planned(compiled) -> Row:
  memory = compiled.memory_analysis()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
    'argument_bytes': memory.argument_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
    'total_bytes': memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + outputs,
  }


def _needed_bytes(error: jax.errors.JaxRuntimeError) -> float:
  """Returns the bytes that the compiler for TPUs found missing.

  Raises:
    jax.errors.JaxRuntimeError: the error is another one.
  """
  match = _NEEDED.search(str(error))
  if match is None:
    raise error
  return float(match[1]) * _UNITS[match[2]]


def _work(config, compiled, mesh, tokens: float) -> roofline.Work:
  text = compiled.as_text()
  program = hlo_text.parse(text)
  flops = program_costs.flops(program)
  if _KERNEL in text:
    # What kernels compute the text does not say: as much as the formula, once.
    periods = config.model.num_layers // len(config.model.mixers)
    flops += (
      tokens
      * periods
      * sum(
        model_flops.core_flops(config.model, name, config.data.sequence_length)
        for name in config.model.mixers
        if name in _ON_KERNELS
      )
    )
  return roofline.Work(
    flops=flops,
    memory_bytes=program_costs.memory_bytes(program),
    collectives=tuple(collectives.of_program(program, mesh)),
  )


def _sent(found: tuple[collectives.Collective, ...]) -> list[Row]:
  totals = collectives.bytes_by_axes(found)
  return [
    {
      'axes': list(axes),
      'kind': kind,
      'bytes': round(size),
      'executions': sum(
        one.executions or 1
        for one in found
        if (one.axes, one.kind) == (axes, kind)
      ),
    }
    for (axes, kind), size in sorted(totals.items(), key=lambda x: -x[1])
  ]


def _taken_stock_of(run, machine: chips.Target, mesh) -> Row:
  """Returns what a run's step takes of the machine."""
  state = train_step.abstract_state(run, mesh)
  tokens = run.data.batch_size * run.data.sequence_length / mesh.size
  length = run.data.sequence_length
  own_flops = tokens * model_flops.flops_per_token(run.model, length)
  row = {
    'mesh': dict(mesh.shape),
    'remat': run.model.remat,
    'tokens_per_chip': tokens,
    'model_flops': own_flops,
    'memory': {
      'chip_bytes': machine.chip.memory_bytes,
      'parameter_bytes': _share_bytes(state['params']),
      'optimizer_bytes': _share_bytes(state['optimizer']),
      'activation_bytes': activation_bytes(run),
    },
  }
  start = time.monotonic()
  try:
    compiled = _compile(run, mesh, state)
  except jax.errors.JaxRuntimeError as error:
    row['memory']['total_bytes'] = _needed_bytes(error)
    return row | {'compile_seconds': time.monotonic() - start}
  row['compile_seconds'] = time.monotonic() - start
  row['memory'] |= _planned(compiled)
  work = _work(run, compiled, mesh, tokens)
  sizes = dict(mesh.shape)
  return row | {
    'flops': work.flops,
    'memory_traffic_bytes': work.memory_bytes,
    'collectives': _sent(work.collectives),
    'estimate': roofline.estimate(work, machine.chip, sizes, own_flops),
  }


def compile_step(
  target: str, config: Mapping[str, Any], choose_remat: bool
) -> Row:
  """Returns what `report` returns but for its origin; only in its child."""
  machine = chips.target(target)
  run = config_lib.from_dict(config_lib.TrainLMConfig, dict(config))
  run = with_mesh(run, machine)
  if not machine.chip.is_tpu:
    kernel_compilation.use_mosaic_gpu()
  mesh = mesh_lib.build(run, ahead_of_time.devices(machine))
  runs = [run]
  if choose_remat:
    state = train_step.abstract_state(run, mesh)
    parameters = _share_bytes(state['params'])
    # Gradients are as large as parameters.
    slots = _share_bytes(state['optimizer'])
    runs = _by_remat(run, 2 * parameters + slots, machine.chip)
  # Where its parts leave room, the whole step may still be too large.
  for run in runs:
    row = _taken_stock_of(run, machine, mesh)
    if row['memory']['total_bytes'] <= machine.chip.memory_bytes:
      break
  return row


def advice(row: Row, config: config_lib.TrainLMConfig) -> str:
  """Returns what to change where a step does not fit, or ''."""
  memory, mesh = row['memory'], row['mesh']
  if memory['total_bytes'] <= memory['chip_bytes']:
    return ''
  state = memory['parameter_bytes'] * 2 + memory['optimizer_bytes']
  if state > memory['chip_bytes'] / 2:
    is_spread = any(mesh[axis] > 1 for axis in sharding.SHARDS)
    axis = 'tensor' if is_spread and mesh['tensor'] == 1 else 'fsdp or sequence'
    return f'parameters, gradients and optimizer take most: raise mesh.{axis}'
  later = (
    REMAT[REMAT.index(row['remat']) + 1 :] if (row['remat'] in REMAT) else ()
  )
  if later and memory['activation_bytes'] > memory['chip_bytes'] / 4:
    return f'activations take most: model.remat={later[0]}'
  micro = config.data.batch_size // (
    config.training.gradient_accumulation_steps
  )
  if micro > mesh['dcn_data'] * mesh['data'] * mesh['fsdp']:
    return (
      'a chip has several rows at once: raise '
      'training.gradient_accumulation_steps or mesh.fsdp'
    )
  return 'a chip has one row alone: raise mesh.sequence'


def report(
  target: str,
  config: config_lib.TrainLMConfig,
  *,
  choose_remat: bool = False,
) -> Row:
  """Returns a row about the train step on a machine that is not there.

  Args:
    target: name of the machine, see `chips.target`.
    config: of the run; a mesh of defaults is replaced, see `with_mesh`.
    choose_remat: take the remat policy that keeps most and leaves room.

  Raises:
    ValueError: there is no such target, or the mesh does not fit it.
    ahead_of_time.ToolsMissingError: the compiler is not installed.
    ahead_of_time.CompilationError: the step does not compile.
  """
  machine = chips.target(target)
  config = with_mesh(config, machine)
  mesh_lib.sizes(config, machine.num_chips)
  found = ahead_of_time.run(
    'experiments.pod_compilation:compile_step',
    {
      'target': target,
      'config': config_lib.to_dict(config),
      'choose_remat': choose_remat,
    },
    parts=ahead_of_time.parts_for(machine.chip),
    timeout_seconds=TIMEOUT_SECONDS,
  )
  memory = found['memory']
  return (
    {'kind': 'compile_report', 'target': machine.name}
    | {'num_chips': machine.num_chips}
    | {'batch_size': config.data.batch_size}
    | {'sequence_length': config.data.sequence_length}
    | found
    | {'fits': memory['total_bytes'] <= memory['chip_bytes']}
    | {'advice': advice(found, config)}
    | result_rows.origin()
    | {'device': 'none'}
  )
