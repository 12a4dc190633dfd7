"""The mesh of a run, and where its state and its batches lie on it."""

import contextlib
import math
from typing import Any

from absl import logging
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from deltanet_jax import sharding
from experiments import config as config_lib

# From the slowest network to the fastest: neighbours share the last axes.
AXES = ('dcn_data', 'data', 'fsdp', 'sequence', 'tensor')


def sizes(config: config_lib.TrainLMConfig, num_devices: int) -> dict[str, int]:
  """Returns the size of every axis, `mesh.data` filled in.

  Raises:
    ValueError: the axes take other than the devices there are, or do not
      divide what they shard.
  """
  found = {axis: getattr(config.mesh, axis) for axis in AXES}
  rows = config.data.batch_size // config.training.gradient_accumulation_steps
  if not found['data']:
    others = math.prod(size for size in found.values() if size)
    copies = rows // (found['dcn_data'] * found['fsdp']) or 1
    found['data'] = math.gcd(num_devices // others or 1, copies)
  taken = math.prod(found.values())
  if taken > num_devices:
    raise ValueError(
      f'the axes of mesh take {taken} devices, '
      f'{" x ".join(f"{a}={n}" for a, n in found.items())}, and there are '
      f'{num_devices}: lower them'
    )
  shares = found['dcn_data'] * found['data'] * found['fsdp']
  if rows % shares:
    raise ValueError(
      'data.batch_size / training.gradient_accumulation_steps must be a '
      f'multiple of mesh.dcn_data * data * fsdp, got {rows} and {shares}'
    )
  return found


def arrange(shape: dict[str, int], devices) -> np.ndarray:
  """Returns the devices in the order of AXES, neighbours near each other.

  An axis need not be whole axes of a TPU's torus: 32 x 2 of 4 x 4 x 4 is fine.
  """
  inner = tuple(1 if axis == 'dcn_data' else n for axis, n in shape.items())
  outer = tuple(n if axis == 'dcn_data' else 1 for axis, n in shape.items())
  slices = {getattr(d, 'slice_index', 0) for d in devices}
  if len(slices) == shape['dcn_data'] > 1:
    return mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, allow_split_physical_axes=True
    )
  if shape['dcn_data'] > 1:
    # No slices are told apart: processes in their order, whole hosts together.
    return np.asarray(devices).reshape(tuple(shape.values()))
  return mesh_utils.create_device_mesh(
    tuple(shape.values()), devices, allow_split_physical_axes=True
  )


def build(config: config_lib.TrainLMConfig, devices: Any = None) -> Mesh:
  """Returns the mesh of Auto axes AXES, all of them, those of size 1 too.

  Args:
    config: `mesh`, and the batch that it shards.
    devices: None: all of all processes.

  Raises:
    ValueError: see `sizes`; or several processes and not all devices in use.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = sizes(config, len(devices))
  taken = math.prod(shape.values())
  if taken < len(devices):
    if len({d.process_index for d in devices}) > 1:
      raise ValueError(
        f'the mesh must take all {len(devices)} devices of the processes, it '
        f'takes {taken}: raise data.batch_size or an axis of mesh'
      )
    logging.warning(
      'The mesh takes %d of %d devices: raise data.batch_size or an axis of '
      'mesh to use more',
      taken,
      len(devices),
    )
  arranged = arrange(shape, devices[:taken])
  return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def tracing(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """Makes the mesh ambient inside of a traced function; None: none is.

  One device is no mesh: ops and layers then trace as they would without.
  """
  if mesh is None or mesh.size == 1:
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of `tokens` and the like, [B, T + 1]: rows alone.

  A row is whole where it arrives and cut inside of the step, since T + 1
  tokens make T predictions.
  """
  return NamedSharding(mesh, PartitionSpec(sharding.BATCH))


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """Returns the NamedSharding of every leaf of a train state or its shapes."""
  specs = sharding.parameter_specs(state, mesh)
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
