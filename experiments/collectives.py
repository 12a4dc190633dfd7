"""Reads what a compiled program sends between devices.

What a loop over layers sends counts once a layer (`hlo_text`). Bytes sent per
device are those of the bandwidth-optimal algorithms; on n devices, of an array
of S bytes,

    all-gather, reduce-scatter, all-to-all   (n - 1) / n S
    all-reduce                               2 (n - 1) / n S

S the whole array of which a device has or gets a share
(R. Thakur et al., Optimization of Collective Communication Operations in MPICH,
2005). A collective-permute sends its operand from each source of a pair.
"""

from collections.abc import Iterable
import dataclasses
import math
import re
from typing import Any

import numpy as np

from experiments import hlo_text

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
_UNKNOWN_KINDS = ('collective-broadcast', 'ragged-all-to-all')

_PAIRS = re.compile(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}')
_LISTED = re.compile(r'replica_groups=\{((?:\{[\d,]*\},?)*)\}')
_IOTA = re.compile(
  r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
)
_NAMED = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')
_NAMED_SIZE = re.compile(r"'([^']+)'=(\d+)")
_NAMED_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
# XLA for TPU writes a reduce-scatter as a fusion of that name, an all-reduce
# and the slice of it that a device keeps.
_SCATTER_FUSION = 'all-reduce-scatter'
# And an exchange beside other work as a chain of fusions, each of which has the
# exchange as an instruction; the last one ends it.
_LINK = 'chain_id='
_END = 'custom_call_target="AsyncCollectiveDone"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """An exchange between devices in a compiled program.

  Attributes:
    kind: one of `KINDS`.
    axes: mesh axes along which devices exchange, in the order of the mesh.
    group_size: devices that exchange with each other.
    bytes: the whole array that is gathered, summed, scattered or exchanged by
      a group; of a permute, what a source sends.
    executions: per call of the program; None inside a loop whose number of
      turns the compiler does not know.
  """

  kind: str
  axes: tuple[str, ...]
  group_size: int
  bytes: int
  executions: int | None

  @property
  def bytes_per_device(self) -> float:
    """Bytes that a device sends, one execution; see the module."""
    if self.kind == 'collective-permute':
      return float(self.bytes)
    ways = 2 if self.kind == 'all-reduce' else 1
    return ways * self.bytes * (self.group_size - 1) / self.group_size

  @property
  def total_bytes_per_device(self) -> float:
    """Bytes that a device sends, all executions; unknown loops turn once."""
    return self.bytes_per_device * (self.executions or 1)


def _numbers(text: str) -> list[int]:
  return [int(x) for x in text.split(',') if x]


def _result_bytes(kind: str, is_start: bool, type_text: str) -> int:
  """Returns the bytes of what a device holds afterwards."""
  elements = hlo_text.elements(type_text)
  # The start of an asynchronous operation gives (operands, results, ...); that
  # of an all-reduce, where it is an instruction of its own, the results.
  paired = is_start and (kind != 'all-reduce' or elements[0].startswith('('))
  return hlo_text.num_bytes(elements[1] if paired else type_text)


def _named_groups(axes_text: str, groups_text: str) -> np.ndarray:
  """Returns the groups along axes of a mesh, or along parts of them."""
  sizes = {name: int(n) for name, n in _NAMED_SIZE.findall(axes_text)}
  shape, inside = [], []
  parts = {
    name: (int(before or 1), int(size or sizes[name]))
    for name, before, size in _NAMED_AXIS.findall(groups_text)
  }
  for name, size in sizes.items():
    before, own = parts.get(name, (size, 1))
    inside.append(len(shape) + 1)
    shape += [before, own, size // before // own]
  ids = np.arange(math.prod(shape)).reshape(shape)
  ids = np.moveaxis(ids, inside, range(-len(inside), 0))
  return ids.reshape(-1, math.prod(ids.shape[-len(inside) :]))


def _groups(attributes: str, num_devices: int) -> list[list[int]]:
  """Returns the groups of devices that exchange with each other.

  Raises:
    ValueError: the groups are written in another form.
  """
  if match := _IOTA.search(attributes):
    shape, source, order = (_numbers(x or '') for x in match.groups())
    ids = np.arange(math.prod(source)).reshape(source)
    return ids.transpose(order or None).reshape(shape).tolist()
  if match := _NAMED.search(attributes):
    return _named_groups(*match.groups()).tolist()
  if match := _LISTED.search(attributes):
    listed = re.findall(r'\{([\d,]*)\}', match[1])
    return [_numbers(x) for x in listed] or [list(range(num_devices))]
  raise ValueError(f'replica_groups are not understood in {attributes!r}')


def _axes(groups: Iterable[Iterable[int]], mesh: Any) -> tuple[str, ...]:
  """Returns the axes along which the devices of a group differ."""
  shape = tuple(mesh.shape.values())
  varies = np.zeros(len(shape), bool)
  for group in groups:
    places = np.array(np.unravel_index(list(group), shape))  # [axes, devices]
    varies |= (places != places[:, :1]).any(axis=1)
  return tuple(a for a, v in zip(mesh.shape, varies, strict=True) if v)


def _collective(
  instruction: hlo_text.Instruction, computation: str, mesh: Any
) -> Collective | None:
  """Returns what an instruction sends, once; None: nothing."""
  kind = instruction.opcode.removesuffix('-start')
  if kind in _UNKNOWN_KINDS:
    raise ValueError(f'{kind} is not understood, of {instruction.name}')
  if kind not in KINDS:
    return None
  is_start = kind != instruction.opcode
  size = _result_bytes(kind, is_start, instruction.type)
  if kind == 'collective-permute':
    pairs = _PAIRS.search(instruction.attributes)[1]
    groups = [_numbers(x) for x in re.findall(r'\{(\d+,\d+)\}', pairs)]
  else:
    groups = _groups(instruction.attributes, math.prod(mesh.shape.values()))
  if kind == 'reduce-scatter':
    size *= len(groups[0])
  if kind == 'all-reduce' and computation.startswith(_SCATTER_FUSION):
    kind = 'reduce-scatter'
  axes = _axes(groups, mesh)
  if not axes:
    return None
  return Collective(
    kind=kind, axes=axes, group_size=len(groups[0]), bytes=size, executions=1
  )


def collectives(text: str, mesh: Any) -> list[Collective]:
  """Returns the exchanges of a program that run, in the order of its text.

  One that devices do with themselves alone is none. Of a conditional, all
  branches count.

  Args:
    text: `Compiled.as_text()`.
    mesh: the `jax.sharding.Mesh` that all of the program's devices are in, or
      its abstract mesh: devices are told by their places in it.

  Raises:
    ValueError: the text has no entry, or a line of it is not understood.
  """
  return of_program(hlo_text.parse(text), mesh)


def of_program(program: hlo_text.Program, mesh: Any) -> list[Collective]:
  """Returns the exchanges of a program that is read already."""
  found = []
  ends = {
    name
    for name, instructions in program.computations.items()
    if any(_END in i.attributes for i in instructions)
  }
  for computation, instruction, executions in hlo_text.executed(program):
    if _LINK in instruction.attributes and computation not in ends:
      continue
    one = _collective(instruction, computation, mesh)
    if one:
      found.append(dataclasses.replace(one, executions=executions))
  return found


def bytes_by_axes(
  found: Iterable[Collective],
) -> dict[tuple[tuple[str, ...], str], float]:
  """Returns {(axes, kind): bytes that a device sends in all}."""
  totals: dict[tuple[tuple[str, ...], str], float] = {}
  for one in found:
    key = one.axes, one.kind
    totals[key] = totals.get(key, 0.0) + one.total_bytes_per_device
  return totals
