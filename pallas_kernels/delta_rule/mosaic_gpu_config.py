"""How the delta rule's Hopper kernels run: block sizes, from a small table.

The table, `mosaic_gpu_config.json`, has a row per kind of device, K and V, for
bfloat16; rows of the device kind `any` are for devices that were not measured.
`python -m experiments.benchmark_kernels --tune` measures the candidates on a
device and writes its rows. Nothing is measured when the op is called.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any

import jax

from pallas_kernels.delta_rule import mosaic_gpu_layout as layout

TABLE = pathlib.Path(__file__).with_suffix('.json')
ANY_DEVICE = 'any'
DTYPE = 'bfloat16'
HEAD_DIMS = (64, 128)
TUNED = ('stages', 'inverse_groups')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """How the kernels run.

  Attributes:
    stages: chunks in shared memory at a time, in the recurrences.
    inverse_groups: chunks that a block of threads inverts at a time.
    save_inverse: keep T for the backward pass (192 bytes per token and head)
      rather than take it anew.
    save_states: keep the states and X for it, too (1,024 bytes at K = V = 128),
      rather than run the recurrence again.
    processors: of the device. If blocks of threads for 64 columns of a state
      were more, one takes all columns, see `mosaic_gpu_scan`.
    interpret: parameters of the interpreter, to run without a GPU.
  """

  stages: int = 2
  inverse_groups: int = 1
  save_inverse: bool = True
  save_states: bool = True
  processors: int = 132
  interpret: object = None

  def __post_init__(self):
    for name in (*TUNED, 'processors'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name} must be at least 1, got {getattr(self, name)}'
        )


def state_groups(sizes: layout.Sizes, config: Config) -> int:
  """Returns how many warpgroups for states a block of threads has.

  Two, if blocks for 64 columns were more than processors: they share what is
  copied and the matrices within a chunk, and take less time than two blocks
  after each other.
  """
  if sizes.rows * sizes.value_blocks <= config.processors:
    return 1
  return 1 if sizes.value_blocks % 2 else 2


def helper_blocks(sizes: layout.Sizes, config: Config) -> int:
  """Returns how many blocks of threads without a row there may be."""
  rows = sizes.rows * sizes.value_blocks
  return config.processors - rows if 2 * rows <= config.processors else 0


def candidates() -> Iterator[Config]:
  """Yields what is worth measuring; not all fit the shared memory."""
  for stages, inverse_groups in itertools.product((2, 3), (1, 2, 3)):
    yield Config(stages=stages, inverse_groups=inverse_groups)


def row(device: str, key_dim: int, value_dim: int, config: Config):
  """Returns a row of the table."""
  where = {'device': device, 'K': key_dim, 'V': value_dim, 'dtype': DTYPE}
  return where | {name: getattr(config, name) for name in TUNED}


@functools.cache
def _table() -> Mapping[tuple[str, int, int], Config]:
  rows = json.loads(TABLE.read_text())
  return {
    (r['device'], r['K'], r['V']): Config(**{n: r[n] for n in TUNED})
    for r in rows
  }


def config_for(key_dim: int, value_dim: int, device: Any = None) -> Config:
  """Returns the config of the table.

  Args:
    key_dim: K, 64 or 128.
    value_dim: V, 64 or 128.
    device: a `jax.Device`; None means the first one.
  """
  kind = (device or jax.devices()[0]).device_kind
  table = _table()
  known = table.get((kind, key_dim, value_dim))
  return known or table[ANY_DEVICE, key_dim, value_dim]


def merged(new: list[Mapping[str, Any]]) -> str:
  """Returns the table's text with the rows of a device kind replaced."""
  kinds = {r['device'] for r in new}
  kept = [r for r in json.loads(TABLE.read_text()) if r['device'] not in kinds]
  lines = ',\n'.join(json.dumps(r) for r in [*kept, *new])
  return f'[\n{lines}\n]\n'
