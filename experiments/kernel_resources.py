"""Reads what Mosaic's GPU kernels take of a GPU, and holds it to limits.

`ahead_of_time.dump_kernels` leaves the files of every kernel in a folder, their
names beginning with `<kernel>_<number>.`: what each pass of the compiler was
given (.mlir-passes.log), the assembler's input (.ptx), its report (.ptxas), the
machine code (.sass_ctrl).
"""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
import re
from typing import Any

MOST_SHARED_BYTES = 232_448  # A block's, on Hopper.

_HGMMA = re.compile(r'\bHGMMA\.(\d+)x(\d+)x(\d+)')
_LOCAL = re.compile(r'\b(?:LDL|STL)\b')
_SHARED = re.compile(r'\bdynamic_shared_memory_size %c(\d+)_i32\b')
_WARNING = re.compile('warning|Performance Loss', re.IGNORECASE)
_NOTE = re.compile(r'\(C\d+\)')
_SPILL_STORES = r'(\d+) bytes spill stores'
_SPILL_LOADS = r'(\d+) bytes spill loads'
_WARPGROUP = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
  """What one kernel takes.

  Attributes:
    kernel: its name.
    registers: per thread, at launch.
    spill_bytes: stored to and loaded from the stack.
    local_accesses: instructions that load or store local memory (LDL, STL).
    shared_bytes: shared memory of a block, which its launch asks for.
    hgmma: instructions that multiply on the tensor cores.
    hgmma_flops: their operations in all warpgroups of a block that compute: all
      but one where registers are handed over (USETMAXREG), else all. Of each
      kind that takes registers there are as many warpgroups.
    warnings: what the assembler warns of, such as wgmmas that it serialized.
    notes: what else it says about its own changes, such as an added wait.
  """

  kernel: str
  registers: int
  spill_bytes: int
  local_accesses: int
  shared_bytes: int
  hgmma: int
  hgmma_flops: int
  warnings: tuple[str, ...]
  notes: tuple[str, ...]


def _file(dump: pathlib.Path, kernel: str, kind: str) -> pathlib.Path:
  pattern = re.compile(rf'{re.escape(kernel)}_\d+\.{re.escape(kind)}')
  found = sorted(p for p in dump.iterdir() if pattern.fullmatch(p.name))
  if len(found) != 1:
    raise ValueError(
      f'{dump} must hold one .{kind} of the kernel {kernel}, got {len(found)}: '
      'give every program a folder, and every kernel of it a name'
    )
  return found[0]


def _shared_bytes(log: pathlib.Path) -> int:
  """Returns the bytes of shared memory of a kernel's launch.

  Raises:
    ValueError: the log has no launch with a constant size.
  """
  with log.open() as lines:  # Most of them are of passes after this one.
    for line in lines:
      if found := _SHARED.search(line):
        return int(found[1])
  raise ValueError(f'{_SHARED.pattern!r} must be in {log}')


def _numbers(pattern: str, text: str) -> list[int]:
  """Returns the numbers that a pattern finds.

  Raises:
    ValueError: it finds none.
  """
  found = [int(number) for number in re.findall(pattern, text)]
  if not found:
    raise ValueError(f'{pattern!r} must be in the report, got {text[:200]!r}')
  return found


def read_kernel(dump: pathlib.Path, kernel: str) -> Resources:
  """Reads the files of one kernel.

  Raises:
    ValueError: not one of each file is there, or a report lacks a number.
  """
  report, code, source = (
    _file(dump, kernel, kind).read_text()
    for kind in ('ptxas', 'sass_ctrl', 'ptx')
  )
  (threads,) = _numbers(r'\.maxntid (\d+)', source)
  products = [math.prod(map(int, shape)) for shape in _HGMMA.findall(code)]
  computing = threads // _WARPGROUP - ('USETMAXREG' in code)
  computing //= max(1, code.count('USETMAXREG.TRY_ALLOC'))
  return Resources(
    kernel=kernel,
    registers=max(_numbers(r'Used (\d+) registers', report)),
    spill_bytes=max(_numbers(_SPILL_STORES, report))
    + max(_numbers(_SPILL_LOADS, report)),
    local_accesses=len(_LOCAL.findall(code)),
    shared_bytes=_shared_bytes(_file(dump, kernel, 'mlir-passes.log')),
    hgmma=len(products),
    hgmma_flops=2 * sum(products) * computing,
    warnings=tuple(s for s in report.splitlines() if _WARNING.search(s)),
    notes=tuple(
      s
      for s in report.splitlines()
      if _NOTE.search(s) and not _WARNING.search(s)
    ),
  )


def kernels(dump: pathlib.Path) -> list[str]:
  """Returns the names of the kernels that were dumped, sorted."""
  return sorted(path.stem.rpartition('_')[0] for path in dump.glob('*.ptxas'))


def broken_gates(row: Mapping[str, Any]) -> list[str]:
  """Returns what a kernel must keep and does not, in words.

  Args:
    row: the fields of `Resources`.
  """
  shared = row['shared_bytes']
  gates = (
    ('spill_bytes', 'be 0', row['spill_bytes'] == 0),
    ('local_accesses', 'be 0', row['local_accesses'] == 0),
    ('warnings', 'be none', not row['warnings']),
    ('shared_bytes', f'be <= {MOST_SHARED_BYTES}', shared <= MOST_SHARED_BYTES),
    ('hgmma', 'be above 0', row['hgmma'] > 0),
  )
  return [
    f'{name} must {rule}, got {row[name]}'
    for name, rule, holds in gates
    if not holds
  ]
