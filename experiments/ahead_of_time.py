"""Compiles for GPUs and TPUs that are not there.

The CUDA plugin of JAX takes a description of a device instead of a device, and
libtpu the name of a slice; they and NVIDIA's assembler lie in a folder of their
own, `TOOLS` (`make setup_aot`): beside them every start of JAX on a machine
without these devices would complain. What they need is set in the environment
before JAX starts, so each compilation runs in a child process, `run`.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
from jax.experimental import topologies

from experiments import chips

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLS = pathlib.Path(sys.prefix) / 'aot'

PARTS = ('jax_cuda13_plugin', 'jax_plugins/xla_cuda13') + tuple(
  f'nvidia/cu13/{name}' for name in ('bin/ptxas', 'bin/nvdisasm', 'nvvm')
)
TPU_PARTS = ('libtpu/libtpu.so',)
_RESULT = 'result.json'

# Facts about the devices that the compiler asks for: GpuTargetConfigProto.
TARGETS = {
  'h200': """
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {
    major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES
  }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H200"
""",
}


class ToolsMissingError(RuntimeError):
  """What compiles for a GPU is not installed."""


class CompilationError(RuntimeError):
  """The child process failed; the message ends with its last lines."""


def missing(
  tools: pathlib.Path = TOOLS, parts: Sequence[str] = PARTS
) -> str | None:
  """Returns what is not installed and how to install it, or None."""
  absent = [part for part in parts if not (tools / part).exists()]
  if not absent:
    return None
  return (
    f'compiling ahead of time needs {", ".join(absent)} in {tools}: run '
    '`make setup_aot`'
  )


def parts_for(chip: chips.Chip) -> tuple[str, ...]:
  """Returns what compiling for a chip needs of `TOOLS`."""
  return TPU_PARTS if chip.is_tpu else PARTS


def _environment(tools: pathlib.Path) -> dict[str, str]:
  """Returns the variables of the child process."""
  kept = {n: v for n, v in os.environ.items() if n != 'XLA_FLAGS'}
  paths = [str(ROOT), str(tools), os.environ.get('PYTHONPATH', '')]
  return kept | {
    'CUDA_ROOT': str(tools / 'nvidia' / 'cu13'),
    'JAX_PLATFORMS': 'cpu',  # Or the plugin looks for libraries of a GPU.
    'JAX_ENABLE_COMPILATION_CACHE': 'false',  # What is cached dumps nothing.
    'PYTHONPATH': os.pathsep.join(filter(None, paths)),
    'TPU_SKIP_MDS_QUERY': '1',  # Or libtpu asks the network which TPU it is on.
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }


def run(
  function: str,
  arguments: Mapping[str, Any],
  *,
  tools: pathlib.Path = TOOLS,
  parts: Sequence[str] = PARTS,
  timeout_seconds: float = 600.0,
) -> Any:
  """Calls a function in a process that can compile for such devices.

  Args:
    function: 'package.module:name'; takes the arguments by name and returns
      what JSON can hold.
    arguments: what JSON can hold.
    tools: the folder that `make setup_aot` fills.
    parts: what of it the function needs.
    timeout_seconds: after which the process is stopped.

  Raises:
    ToolsMissingError: the folder lacks something.
    CompilationError: the function raised, or the compiler ended the process.
    subprocess.TimeoutExpired: it took too long.
  """
  reason = missing(tools, parts)
  if reason:
    raise ToolsMissingError(reason)
  with tempfile.TemporaryDirectory(prefix='ahead_of_time_') as scratch:
    result = pathlib.Path(scratch) / _RESULT
    command = [sys.executable, '-m', 'experiments.ahead_of_time']
    command += [function, json.dumps(dict(arguments)), str(result)]
    child = subprocess.run(
      command,
      cwd=scratch,
      env=_environment(tools),
      capture_output=True,
      text=True,
      timeout=timeout_seconds,
    )
    if child.returncode or not result.exists():
      tail = '\n'.join(child.stderr.splitlines()[-20:])
      raise CompilationError(
        f'{function} ended with status {child.returncode}:\n{tail}'
      )
    return json.loads(result.read_text())


def devices(target: chips.Target) -> list[jax.Device]:
  """Returns devices that can be compiled for; only below `run`.

  Raises:
    ValueError: nothing compiles for such a chip, or its devices are cores.
  """
  name = target.chip.name
  if target.chip.is_tpu:
    topology = f'{name}:{"x".join(map(str, target.shape))}'
    found = topologies.get_topology_desc(platform='tpu', topology_name=topology)
    if len(found.devices) != target.num_chips:
      raise ValueError(
        f'{target.name} has {len(found.devices)} devices for '
        f'{target.num_chips} chips: only kinds with a device a chip are known'
      )
    return list(found.devices)
  if name not in TARGETS:
    raise ValueError(f'target must be one of {tuple(TARGETS)}, got {name!r}')
  hosts = -(-target.num_chips // chips.GPUS_PER_HOST)
  found = topologies.get_topology_desc(
    platform='cuda',
    target_config=TARGETS[name],
    topology=f'{hosts}x1x{target.num_chips // hosts}',
  )
  return list(found.devices)


def lower_for(
  target: str, function: Callable[..., Any], arguments: Any
) -> jax.stages.Lowered:
  """Lowers a jitted function for one device of a kind; only below `run`.

  Args:
    target: a name in `TARGETS`.
    function: what `jax.jit` returned.
    arguments: a tuple of trees of arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: there is no such target.
  """
  if target not in TARGETS:
    raise ValueError(f'target must be one of {tuple(TARGETS)}, got {target!r}')
  (device,) = devices(chips.target(target))
  sharding = jax.sharding.SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    arguments,
  )
  # Mosaic asks the default device for its architecture.
  with jax.default_device(device):
    return function.trace(*arguments).lower()


def dump_kernels(lowered: jax.stages.Lowered, folder: pathlib.Path) -> None:
  """Compiles a program; only below `run`.

  Args:
    lowered: of `lower_for`. What lowering would dump takes longer than it.
    folder: for what the compiler says of Mosaic kernels, up to 100 MB of each.
  """
  os.environ['MOSAIC_GPU_DUMP_TO'] = str(folder)
  try:
    lowered.compile()
  finally:
    del os.environ['MOSAIC_GPU_DUMP_TO']


def _child(function: str, arguments: str, result: str) -> None:
  module, _, name = function.partition(':')
  found = getattr(importlib.import_module(module), name)(
    **json.loads(arguments)
  )
  pathlib.Path(result).write_text(json.dumps(found))


if __name__ == '__main__':
  _child(*sys.argv[1:])
