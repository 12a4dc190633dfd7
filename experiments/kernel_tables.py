"""Tables of the rows that `kernel_compilation` yields."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import itertools
from typing import Any

Row = Mapping[str, Any]

# Bytes per token and head at K = V = 128 without decay, in bfloat16: what every
# implementation reads and writes (q, k, v, beta, o; and q, k, v, beta, do, dq,
# dk, dv, dbeta), and what the kernels of flash-linear-attention do.
COMPULSORY_BYTES = {'forward': 1026, 'backward': 1796}
FLA_BYTES = {'forward': 5124, 'backward': 12_038}

# With and without `Config.save_states`.
_KERNELS = (
  {
    'forward': ('inverse', 'recurrence_saving'),
    'backward': ('recurrence_bwd', 'chunk_bwd'),
  },
  {
    'forward': ('inverse', 'recurrence'),
    'backward': ('states', 'recurrence_bwd', 'chunk_bwd'),
  },
)

_COUNTED = {
  kernel
  for kinds in _KERNELS
  for kernel in itertools.chain.from_iterable(kinds.values())
}

_COLUMNS = (
  ('head_dim', '>8'),
  ('gate', '>6'),
  ('normalize_qk', '>14'),
  ('columns', '>9'),
  ('pass', '>10'),
  ('kernel', '>30'),
  ('registers', '>11'),
  ('spill_bytes', '>13'),
  ('local_accesses', '>16'),
  ('shared_bytes', '>14'),
  ('hgmma', '>7'),
  ('warnings', '>10'),
  ('bytes_per_token', '>17'),
  ('flops_per_token', '>17'),
)


def _cell(value: Any) -> str:
  if value is None:
    return '-'
  if isinstance(value, list | tuple):
    return str(len(value))
  return f'{value:,.0f}' if isinstance(value, float) else str(value)


def header() -> str:
  """Returns the heading of the table; sizes are per token and value head."""
  return ''.join(f'{name:{width}}' for name, width in _COLUMNS)


def format_row(row: Row) -> str:
  """Returns a line under `header`, or one about the training step."""
  if row['kind'] != 'kernel_resources':
    return (
      f'training step of {row["preset"]}, {row["batch"]} x {row["length"]} '
      f'tokens: {row["temp_bytes"] / 1e9:.1f} GB of temporary memory beside '
      f'{row["argument_bytes"] / 1e9:.1f} GB of state'
    )
  return ''.join(f'{_cell(row[name]):{width}}' for name, width in _COLUMNS)


def totals(rows: Sequence[Row]) -> Iterator[str]:
  """Yields the bytes of both passes at K = V = 128, beside what is known.

  With the states kept they are those of other kernels; a forward pass without
  a gradient keeps none.
  """
  kernels = {
    row['kernel'].removeprefix('delta_rule_'): row['bytes_per_token']
    for row in rows
    if row['kind'] == 'kernel_resources'
    and (row['head_dim'], row['gate']) == (128, 'none')
    and not row['normalize_qk']
  }
  if not kernels.keys() >= _COUNTED:
    return
  for name, least in COMPULSORY_BYTES.items():
    found, without = (
      sum(kernels[kernel] for kernel in kinds[name]) for kinds in _KERNELS
    )
    yield (
      f'{name}, K = V = 128, no decay: {found:,.0f} bytes per token and head, '
      f'{without:,.0f} with no states kept; {least:,} are compulsory, '
      f'flash-linear-attention takes {FLA_BYTES[name]:,}'
    )


def broken(rows: Iterable[Row]) -> Iterator[str]:
  """Yields a line per broken gate."""
  for row in rows:
    where = [
      str(row[name])
      for name in (
        'kernel',
        'head_dim',
        'gate',
        'normalize_qk',
        'columns',
        'preset',
      )
      if name in row
    ]
    for gate in row['broken']:
      yield f'BROKEN: {", ".join(where)}: {gate}'
