"""The least time that a compiled step can take on its chips: an estimate.

Three clocks run beside each other, for a chip's own share of the step:

    compute   FLOPs / peak in bfloat16
    memory    bytes of the main memory / its bandwidth
    network   sum over the axes of the mesh of bytes sent / bandwidth

Were all three hidden behind the longest, the step would take that; were nothing
hidden, their sum. What a machine does lies above the first and may lie above
the second: neither latencies nor the shape of products are known here, nor what
caches spare. So the MFU found is one that will not be exceeded, no forecast.

A group of GPUs that reaches across hosts has the adapters of all its members in
a host, at most what NVLink gives; an axis of a TPU's mesh has one axis of the
torus, both ways. `dcn_data` goes over the network between hosts or slices.
"""

from collections.abc import Iterable
import dataclasses

from experiments import chips
from experiments import collectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What a chip does in a step.

  Attributes:
    flops: FLOPs of the program, recomputation included.
    memory_bytes: bytes of the main memory, read or written.
    collectives: what it sends.
  """

  flops: float
  memory_bytes: float
  collectives: tuple[collectives.Collective, ...]


def bandwidth(
  chip: chips.Chip, axes: Iterable[str], members_per_host: int, group_size: int
) -> float:
  """Returns the bytes/s that a chip sends to the others of its group.

  Args:
    chip: all of the group.
    axes: along which the group exchanges.
    members_per_host: of a GPU's group.
    group_size: members of the group.
  """
  if chip.is_tpu:
    is_slow = 'dcn_data' in axes
    return chip.network_bandwidth if is_slow else chip.link_bandwidth
  if members_per_host >= group_size:
    return chip.link_bandwidth
  return min(chip.link_bandwidth, members_per_host * chip.network_bandwidth)


def members_per_host(mesh_shape: dict[str, int], axes: Iterable[str]) -> int:
  """Returns how many GPUs of a group along axes one host has.

  Hosts are eight neighbours in the order of the mesh's devices.

  Args:
    mesh_shape: sizes by axis, the last the fastest to change.
    axes: of the group.
  """
  stride, count = 1, 1
  for axis, size in reversed(mesh_shape.items()):
    if axis in axes:
      inside = max(1, min(size, chips.GPUS_PER_HOST // stride))
      count *= inside
    stride *= size
  return count


def estimate(
  work: Work,
  chip: chips.Chip,
  mesh_shape: dict[str, int],
  model_flops: float,
) -> dict[str, object]:
  """Returns the estimated times in seconds, and MFU, as a row's field.

  Args:
    work: of a chip in a step.
    chip: all of the mesh.
    mesh_shape: sizes by axis.
    model_flops: a chip's share of the step's model FLOPs.
  """
  network: dict[str, float] = {}
  for one in work.collectives:
    speed = bandwidth(
      chip, one.axes, members_per_host(mesh_shape, one.axes), one.group_size
    )
    name = ' '.join(one.axes)
    seconds = one.total_bytes_per_device / speed
    network[name] = network.get(name, 0.0) + seconds
  clocks = {
    'compute': work.flops / chip.peak_flops,
    'memory': work.memory_bytes / chip.memory_bandwidth,
    'network': sum(network.values()),
  }
  longest, total = max(clocks.values()), sum(clocks.values())
  return {
    'is_estimate': True,
    'seconds': clocks,
    'network_seconds': network,
    'bound_by': max(clocks, key=clocks.get),
    'step_seconds': longest,
    'step_seconds_nothing_hidden': total,
    'mfu': model_flops / (longest * chip.peak_flops),
    'mfu_nothing_hidden': model_flops / (total * chip.peak_flops),
  }
