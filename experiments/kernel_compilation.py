"""Compiles the Hopper kernels of the delta rule, and a training step of them.

Beside what `kernel_resources` reads there are the costs of each kernel, per
token and value head: bytes of the arrays that it reads and writes, each counted
once, and the operations of its products (HGMMA). A recurrence is compiled in
every form it has: a block of threads takes 64 columns of a state, or all
`columns`, or others work beside it in the same launch. The products of the
latter two, some of which are in a loop or another's, are not counted. What runs
for a row that devices share is a pass of its own, `part`.

`kernel_rows` and `train_step_row` start child processes; what runs in these,
`compile_delta_rule` and `compile_train_step`, is called by nobody else.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import math
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

import deltanet_jax
from experiments import ahead_of_time
from experiments import config as config_lib
from experiments import kernel_resources
from experiments import result_rows
from experiments.training import train_step
from pallas_kernels import dispatch
from pallas_kernels.delta_rule import api
from pallas_kernels.delta_rule import mosaic_gpu
from pallas_kernels.delta_rule import mosaic_gpu_config
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout
from pallas_kernels.delta_rule import mosaic_gpu_recurrence as recurrence
from pallas_kernels.delta_rule import (
  mosaic_gpu_recurrence_bwd as recurrence_bwd,
)
from pallas_kernels.delta_rule import mosaic_gpu_scan as scan

Row = dict[str, Any]

HEAD_DIMS = (64, 128)
GATES = ('none', 'head')
NORMALIZATIONS = (False, True)

PRESET = 'delta_net_1b'
TRAIN_BATCH = 4
TRAIN_LENGTH = 2048
# 49.1 GB when this was written; the device has 151, and the state takes 16.
MOST_TEMP_BYTES = 51_000_000_000

_CHUNK = 64
_WIDTH = 64  # Columns that every block of threads of a recurrence takes.
_PARALLEL = ('delta_rule_inverse', 'delta_rule_chunk_bwd')  # No recurrences.
_PART = 'delta_rule_part'  # The one with V + K columns.
# With others beside them.
_SHARED = (
  'delta_rule_chunk_fwd_recurrence',
  'delta_rule_chunk_fwd_recurrence_saving',
  'delta_rule_recurrence_chunk_bwd',
)
_B, _T, _H = 2, 4096, 16
_CALL = 'stablehlo.custom_call'
_MOSAIC = 'mosaic_gpu'
_BITS = {'bf16': 16, 'f32': 32, 'i32': 32}


def _operations(operation) -> Iterator[Any]:
  """Yields an operation of MLIR and all within."""
  yield operation
  for region in operation.regions:
    for block in region:
      for inner in block:
        yield from _operations(inner.operation)


def _size(value) -> int:
  """Returns the bytes of an operand or a result."""
  kind = value.type
  return math.prod(kind.shape) * _BITS[str(kind.element_type)] // 8


def call_bytes(lowered: jax.stages.Lowered, kernel: str) -> int:
  """Returns the bytes that a kernel of a program reads and writes.

  Raises:
    ValueError: the program does not call it once.
  """
  sizes = []
  for operation in _operations(lowered.compiler_ir('stablehlo').operation):
    if operation.name != _CALL:
      continue
    attributes = operation.attributes
    if _MOSAIC in str(attributes['call_target_name']) and (
      f'{kernel}_{_MOSAIC}' in str(attributes['mhlo.backend_config'])
    ):
      sizes.append(sum(map(_size, [*operation.operands, *operation.results])))
  if len(sizes) != 1:
    raise ValueError(f'{kernel} must be called once, got {len(sizes)} calls')
  return sizes[0]


def _arguments(head_dim: int, gate: str) -> dict[str, jax.ShapeDtypeStruct]:
  x = jax.ShapeDtypeStruct((_B, _T, _H, head_dim), jnp.bfloat16)
  state = jax.ShapeDtypeStruct((_B, _H, head_dim, head_dim), jnp.float32)
  arguments = {'q': x, 'k': x, 'v': x, 'initial_state': state}
  arguments['beta'] = jax.ShapeDtypeStruct((_B, _T, _H), jnp.bfloat16)
  if gate == 'head':
    arguments['g'] = jax.ShapeDtypeStruct((_B, _T, _H), jnp.float32)
  return arguments


def _passes(
  head_dim: int, gate: str, normalize_qk: bool, processors: int
) -> dict[str, tuple[Any, Any]]:
  """Returns the jitted function and its arguments, by pass.

  The backward pass is a program of its own: what is kept for it goes in.
  `saving` is the forward pass that keeps the states for it, too, as it is by
  default; `backward` is one that finds them again, and has all its kernels.
  """

  def forward(arguments, *, save_states):
    config = mosaic_gpu_config.config_for(head_dim, head_dim)
    run = functools.partial(
      mosaic_gpu.delta_rule,
      scale=head_dim**-0.5,
      normalize_qk=normalize_qk,
      config=dataclasses.replace(
        config, save_states=save_states, processors=processors
      ),
    )
    return jax.vjp(lambda a: run(**a), arguments)

  passes = {
    name: jax.jit(functools.partial(forward, save_states=name == 'saving'))
    for name in ('forward', 'saving')
  }
  arguments = _arguments(head_dim, gate)
  values, pullback = jax.eval_shape(passes['forward'], arguments)
  backward = jax.jit(lambda pullback, cotangents: pullback(cotangents))
  return {name: (f, (arguments,)) for name, f in passes.items()} | {
    'backward': (backward, (pullback, values)),
    'part': _part(head_dim, gate, normalize_qk, processors),
  }


def _part(head_dim: int, gate: str, normalize_qk: bool, processors: int):
  """Returns the jitted function of the kernels of a part, and its arguments."""
  config = dataclasses.replace(
    mosaic_gpu_config.config_for(head_dim, head_dim), processors=processors
  )
  sizes = layout.Sizes(
    B=_B,
    T=_T,
    H=_H,
    HV=_H,
    K=head_dim,
    V=head_dim,
    gated=gate != 'none',
    scale=head_dim**-0.5,
    normalized=normalize_qk,
  )
  count = sizes.rows * sizes.chunks
  array = jax.ShapeDtypeStruct
  arguments = {
    **dict.fromkeys('qkvo', array((_B, _T, _H * head_dim), jnp.bfloat16)),
    'inverse': array((count, 3 * _CHUNK, _CHUNK // 2), jnp.bfloat16),
    'rows': array((count, sizes.lines, _CHUNK), jnp.float32),
    'norms': dict.fromkeys(
      scan.NORMS if normalize_qk else (), layout.norms(sizes)
    ),
    'state': array((sizes.rows, head_dim, head_dim), jnp.float32),
  }

  def run(q, k, v, o, inverse, rows, norms, state):
    forward = recurrence.part(
      *(k, v, inverse, rows, norms.get('key_norms'), state, sizes),
      config=config,
    )
    backward = recurrence_bwd.state_gradients(
      *(q, k, o, inverse, rows, norms, state, sizes), config=config, keep=False
    )
    return forward, backward

  return jax.jit(run), tuple(arguments.values())


def _blocks_per_chunk(kernel: str, head_dim: int) -> float:
  """Returns how many blocks of threads take part in a chunk of a head."""
  if kernel == 'delta_rule_inverse':
    config = mosaic_gpu_config.config_for(head_dim, head_dim)
    return 1 / config.inverse_groups
  return head_dim // _WIDTH * (2 if kernel == _PART else 1)


def _compile_passes(
  target: str,
  head_dim: int,
  gate: str,
  normalize_qk: bool,
  *,
  columns: int,
  processors: int,
) -> Iterator[Row]:
  """Yields resources and costs of the kernels of all passes, each once."""
  tokens = _B * _T * _H
  seen = set()
  passes = _passes(head_dim, gate, normalize_qk, processors)
  for name, (function, arguments) in passes.items():
    with tempfile.TemporaryDirectory() as scratch:
      dump = pathlib.Path(scratch)
      lowered = ahead_of_time.lower_for(target, function, arguments)
      ahead_of_time.dump_kernels(lowered, dump)
      for kernel in kernel_resources.kernels(dump):
        if kernel in seen:
          continue
        seen.add(kernel)
        row = dataclasses.asdict(kernel_resources.read_kernel(dump, kernel))
        row['bytes_per_token'] = call_bytes(lowered, kernel) / tokens
        blocks = _blocks_per_chunk(kernel, head_dim)
        row['flops_per_token'] = row.pop('hgmma_flops') * blocks / _CHUNK
        case = {
          'head_dim': head_dim,
          'gate': gate,
          'normalize_qk': normalize_qk,
          'columns': columns,
        }
        yield case | {'pass': name} | row


def _compile_case(target: str, head_dim: int, *case) -> Iterator[Row]:
  """Yields the rows of a case, those of recurrences in every form."""
  blocks = _B * _H * head_dim // _WIDTH
  run = functools.partial(_compile_passes, target, head_dim, *case)
  both = {'columns': 2 * _WIDTH, 'flops_per_token': None}
  for row in run(columns=_WIDTH, processors=blocks):
    # This has more columns, and blocks of threads for two times 64.
    yield row | both if row['kernel'] == _PART else row
  for row in run(columns=_WIDTH, processors=3 * blocks):
    if row['kernel'] == _PART:
      yield row
    elif row['kernel'] in _SHARED:
      yield row | {'flops_per_token': None}
  if head_dim == _WIDTH:
    return
  for row in run(columns=_WIDTH, processors=1):
    # Of what has been compiled nothing is found here again.
    if row['kernel'] not in _PARALLEL:
      yield row | both


def compile_delta_rule(
  target: str, head_dim: int, gates: list[str], normalize_qk: bool
) -> list[Row]:
  """Returns resources and costs of the kernels of some cases."""
  return [
    row
    for gate in gates
    for row in _compile_case(target, head_dim, gate, normalize_qk)
  ]


def _origin(target: str) -> Row:
  """Returns the origin of a row: no device computed it."""
  return {'target': target} | result_rows.origin() | {'device': 'none'}


def kernel_rows(
  target: str,
  *,
  head_dims=HEAD_DIMS,
  gates=GATES,
  normalizations=NORMALIZATIONS,
) -> Iterator[Row]:
  """Yields a row per kernel, of both passes in every case.

  A row's `broken` lists the gates that the kernel breaks.

  Raises:
    ahead_of_time.ToolsMissingError: the compiler is not installed.
    ahead_of_time.CompilationError: a kernel does not compile.
  """
  # Not all in one child: that has ten minutes.
  for head_dim, normalize_qk in itertools.product(head_dims, normalizations):
    found = ahead_of_time.run(
      'experiments.kernel_compilation:compile_delta_rule',
      {
        'target': target,
        'head_dim': head_dim,
        'gates': gates,
        'normalize_qk': normalize_qk,
      },
    )
    for row in found:
      yield (
        {'kind': 'kernel_resources', 'op': 'delta_rule'}
        | row
        | {'broken': kernel_resources.broken_gates(row)}
        | _origin(target)
      )


def _config(preset: str, batch: int, length: int) -> config_lib.TrainLMConfig:
  model = getattr(deltanet_jax, preset)()
  mixer = dataclasses.replace(model.delta_net, implementation='mosaic_gpu')
  return config_lib.TrainLMConfig(
    model=dataclasses.replace(model, delta_net=mixer),
    data=config_lib.DataConfig(batch_size=batch, sequence_length=length),
    training=config_lib.TrainingConfig(num_steps=10_000),
  )


def use_mosaic_gpu() -> None:
  """Lets the delta rule take its Hopper kernels in this process.

  They would decline, since the machine that compiles has no such device.
  """
  kernels, *others = api.DELTA_RULE.implementations
  available = dataclasses.replace(kernels, unavailable=lambda: None)
  api.DELTA_RULE = dispatch.Op('delta_rule', (available, *others))


def compile_train_step(
  target: str, preset: str, batch: int, length: int
) -> Row:
  """Returns the bytes of memory that a training step needs."""
  use_mosaic_gpu()
  config = _config(preset, batch, length)
  state = jax.eval_shape(lambda: train_step.init_state(config))
  window = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
  batch_shapes = {'tokens': window, 'segment_ids': window}
  lowered = ahead_of_time.lower_for(
    target, train_step.build(config), (state, batch_shapes)
  )
  memory = lowered.compile().memory_analysis()
  return {
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'alias_bytes': memory.alias_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
  }


def train_step_row(
  target: str,
  *,
  preset: str = PRESET,
  batch: int = TRAIN_BATCH,
  length: int = TRAIN_LENGTH,
) -> Row:
  """Returns the memory of a jitted training step on one device.

  Raises:
    ahead_of_time.ToolsMissingError: the compiler is not installed.
    ahead_of_time.CompilationError: the step does not compile.
  """
  sizes = {'preset': preset, 'batch': batch, 'length': length}
  found = ahead_of_time.run(
    'experiments.kernel_compilation:compile_train_step',
    {'target': target} | sizes,
  )
  broken = []
  if found['temp_bytes'] > MOST_TEMP_BYTES:
    broken = [
      f'temp_bytes must be <= {MOST_TEMP_BYTES}, got {found["temp_bytes"]}'
    ]
  return (
    {'kind': 'train_step_memory'}
    | sizes
    | found
    | {'broken': broken}
    | _origin(target)
  )


def all_rows(target: str) -> Iterator[Row]:
  """Yields the rows of the kernels, then that of the training step."""
  yield from kernel_rows(target)
  yield train_step_row(target)
