"""How a train step's work falls with the number of devices that share it.

The step of DeltaNet with 340M parameters cut to four layers is compiled for 1,
2, 4 and 8 H200s that are not there: with the recurrence in XLA and float32,
whose products the program's text shows, and with the Hopper kernels in
bfloat16, as it trains. `fsdp` cuts eight rows, `sequence` the tokens of one as
long as these together. There are as many tokens as one device can hold: of a
step that does not fit XLA recomputes some products by itself, and others of
another number of devices. With fewer, what does not depend on them (whole
parameters are used on every device) weighs more. Along both axes every device
should compute and move 1 / n, and send, in float32, what `mesh_traffic` says.
What kernels compute the program's text does not say.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import pathlib
from typing import NamedTuple

import deltanet_jax
from experiments import config as config_lib
from experiments import mesh_traffic
from experiments import pod_compilation
from experiments import result_rows

KIND = 'scaling'
AXES = ('fsdp', 'sequence')
DEVICES = (1, 2, 4, 8)
ROWS = {'fsdp': 8, 'sequence': 1}
DTYPES = {'xla': 'float32', 'mosaic_gpu': 'bfloat16'}
TOKENS = {'xla': 2**17, 'mosaic_gpu': 7 * 2**15}


class Case(NamedTuple):
  """What a row is about."""

  implementation: str
  axis: str
  num_devices: int


CASES = tuple(itertools.starmap(Case, itertools.product(DTYPES, AXES, DEVICES)))


def config(case: Case) -> config_lib.TrainLMConfig:
  """Returns the run whose step is compiled."""
  model = deltanet_jax.preset('delta_net', '340m')
  mixer = dataclasses.replace(
    model.delta_net, implementation=case.implementation
  )
  rows = ROWS[case.axis]
  return config_lib.TrainLMConfig(
    model=dataclasses.replace(
      model,
      num_layers=4,
      delta_net=mixer,
      dtype=DTYPES[case.implementation],
    ),
    data=config_lib.DataConfig(
      batch_size=rows, sequence_length=TOKENS[case.implementation] // rows
    ),
    training=config_lib.TrainingConfig(num_steps=10_000),
    mesh=config_lib.MeshConfig(**({'data': 1} | {case.axis: case.num_devices})),
  )


def _row(case: Case) -> pod_compilation.Row:
  run = config(case)
  found = pod_compilation.report(f'h200:{case.num_devices}', run)
  sent = {'sent_bytes': sum(x['bytes'] for x in found['collectives'])}
  if run.model.dtype == 'float32':  # The formula is for no other.
    sent['formula_bytes'] = mesh_traffic.sent_bytes(
      run, case.axis, case.num_devices, reduce_scatter=True
    )
  return found | {'kind': KIND} | case._asdict() | sent


def run(path: pathlib.Path) -> Iterator[pod_compilation.Row]:
  """Adds the rows that are missing to a file, and yields them.

  Raises:
    ahead_of_time.ToolsMissingError: a compiler is not installed.
    ahead_of_time.CompilationError: a step does not compile.
  """
  rows = result_rows.read(path)
  done = {tuple(row[name] for name in Case._fields) for row in rows}
  for case in CASES:
    if case not in done:
      rows.append(_row(case))
      result_rows.write(path, rows)
      yield rows[-1]


def describe(row: pod_compilation.Row) -> str:
  """Returns a line about a row."""
  text = (
    f'{row["implementation"]} {row["axis"]} {row["num_devices"]}: '
    f'{row["flops"] / 1e12:.2f} TFLOP, '
    f'{row["memory_traffic_bytes"] / 1e9:.1f} GB moved, '
    f'{row["sent_bytes"] / 1e9:.4f} GB sent'
  )
  if 'formula_bytes' in row:
    text += f', by formula {row["formula_bytes"] / 1e9:.4f}'
  return text
