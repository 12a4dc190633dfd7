"""What accelerators can do, and the names of machines made of them.

Peaks are of dense bfloat16 products, sparsity not counted. Links are what one
chip sends: on a TPU both ways along one axis of the torus, on a GPU to the
others of its host through NVLink. Memories, sold in GB, are as many GiB: the
compiler for v5p has 95.7, an H200 reports 151.4e9 bytes. Sources:

* TPU: J. Austin et al., How to Scale Your Model, 2025, chapter 2, tables of TPU
  specs and of interconnects; HBM as there.
* GPU: NVIDIA's data sheets of the H200, H100 SXM and A100 80GB SXM; the network
  is a ConnectX adapter per GPU, as in DGX machines: 400 Gb/s (A100: 200).
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """An accelerator.

  Attributes:
    name: as in the names of targets.
    kinds: how JAX calls it, `device.device_kind`, as prefixes.
    peak_flops: FLOP/s of dense products in bfloat16.
    memory_bytes: size of the main memory.
    memory_bandwidth: bytes/s of the main memory.
    link_bandwidth: bytes/s that a chip sends to its neighbours.
    network_bandwidth: bytes/s that a chip sends to other hosts (GPU) or slices
      (TPU).
  """

  name: str
  kinds: tuple[str, ...]
  peak_flops: float
  memory_bytes: float
  memory_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float

  @property
  def is_tpu(self) -> bool:
    """Whether the chip is a TPU, which `libtpu` compiles for."""
    return self.name.startswith('v')


GIB = 2**30
CHIPS = (
  # Austin et al., TPU v4p.
  Chip(
    name='v4',
    kinds=('TPU v4',),
    peak_flops=2.75e14,
    memory_bytes=32 * GIB,
    memory_bandwidth=1.2e12,
    link_bandwidth=9e10,
    network_bandwidth=6.25e9,
  ),
  # Austin et al.
  Chip(
    name='v5e',
    kinds=('TPU v5 lite', 'TPU v5e'),
    peak_flops=1.97e14,
    memory_bytes=16 * GIB,
    memory_bandwidth=8.2e11,
    link_bandwidth=9e10,
    network_bandwidth=3.125e9,
  ),
  # Austin et al.
  Chip(
    name='v5p',
    kinds=('TPU v5',),
    peak_flops=4.59e14,
    memory_bytes=96 * GIB,
    memory_bandwidth=2.8e12,
    link_bandwidth=1.8e11,
    network_bandwidth=6.25e9,
  ),
  # Austin et al.
  Chip(
    name='v6e',
    kinds=('TPU v6 lite', 'TPU v6e'),
    peak_flops=9.2e14,
    memory_bytes=32 * GIB,
    memory_bandwidth=1.6e12,
    link_bandwidth=1.8e11,
    network_bandwidth=1.25e10,
  ),
  # Data sheet: 1979 TFLOP/s sparse; NVLink 900 GB/s both ways.
  Chip(
    name='h200',
    kinds=('NVIDIA H200',),
    peak_flops=9.89e14,
    memory_bytes=141 * GIB,
    memory_bandwidth=4.8e12,
    link_bandwidth=4.5e11,
    network_bandwidth=5e10,
  ),
  # Data sheet of the SXM board, as above.
  Chip(
    name='h100',
    kinds=('NVIDIA H100 80GB HBM3',),
    peak_flops=9.89e14,
    memory_bytes=80 * GIB,
    memory_bandwidth=3.35e12,
    link_bandwidth=4.5e11,
    network_bandwidth=5e10,
  ),
  # Data sheet: 312 TFLOP/s; NVLink 600 GB/s both ways.
  Chip(
    name='a100',
    kinds=('NVIDIA A100-SXM4-80GB',),
    peak_flops=3.12e14,
    memory_bytes=80 * GIB,
    memory_bandwidth=2.039e12,
    link_bandwidth=3e11,
    network_bandwidth=2.5e10,
  ),
)
GPUS_PER_HOST = 8


@dataclasses.dataclass(frozen=True)
class Target:
  """Chips of a kind in a slice (TPU) or in hosts of eight (GPU).

  Attributes:
    name: as it was given.
    chip: the kind.
    shape: of the slice; of GPUs their number.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def num_chips(self) -> int:
    """Number of chips."""
    return math.prod(self.shape)


def of_kind(device_kind: str) -> Chip | None:
  """Returns the chip that JAX calls so; None: it is not in the table."""
  matches = [
    (len(kind), chip)
    for chip in CHIPS
    for kind in chip.kinds
    if device_kind.startswith(kind)
  ]
  return max(matches, key=lambda match: match[0])[1] if matches else None


def target(name: str) -> Target:
  """Returns what a name says: `v5p:4x4x4`, `v5e:16x16`, `h200:64`, `h200`.

  Raises:
    ValueError: the kind is not known, or the shape is none of it.
  """
  kind, _, shape_text = name.lower().partition(':')
  found = {chip.name: chip for chip in CHIPS}.get(kind)
  if found is None:
    raise ValueError(
      f'the target must begin with one of {", ".join(c.name for c in CHIPS)}, '
      f'got {name!r}'
    )
  shape_text = shape_text or ('' if found.is_tpu else '1')
  if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*){0,2}', shape_text):
    raise ValueError(
      'the target must be a TPU and the shape of its slice, as v5p:4x4x4, or a '
      f'GPU and their number, as h200:8, got {name!r}'
    )
  shape = tuple(int(n) for n in shape_text.split('x'))
  count = math.prod(shape)
  if not found.is_tpu and (
    len(shape) > 1 or count > GPUS_PER_HOST and count % GPUS_PER_HOST
  ):
    raise ValueError(
      f'GPUs come as 1 to {GPUS_PER_HOST} or as whole hosts of '
      f'{GPUS_PER_HOST}, got {name!r}'
    )
  return Target(name, found, shape)
