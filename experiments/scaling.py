"""How a train step's work falls with the number of devices that share it.

The step of DeltaNet with 340M parameters cut to four layers, 2^17 tokens in
rows of 2^14, is compiled for 1, 2, 4 and 8 H200s that are not there, in float32
and with the recurrence in XLA, whose products the program's text shows. So many
tokens one device can hold: of a step that does not fit XLA recomputes some
products by itself, and others of another number of devices. With fewer, what
does not depend on them (whole parameters are used on every device) weighs more.
Along `fsdp` and along `sequence` every device should compute and move 1 / n,
and send what `mesh_traffic` says.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import pathlib

import deltanet_jax
from experiments import config as config_lib
from experiments import mesh_traffic
from experiments import pod_compilation
from experiments import result_rows

KIND = 'scaling'
AXES = ('fsdp', 'sequence')
DEVICES = (1, 2, 4, 8)
CASES = ((AXES[0], 1), *itertools.product(AXES, DEVICES[1:]))
LENGTH = 2**14
TOKENS = 2**17


def config(axis: str, num_devices: int) -> config_lib.TrainLMConfig:
  """Returns the run whose step is compiled."""
  model = deltanet_jax.preset('delta_net', '340m')
  mixer = dataclasses.replace(model.delta_net, implementation='xla')
  return config_lib.TrainLMConfig(
    model=dataclasses.replace(
      model, num_layers=4, delta_net=mixer, dtype='float32'
    ),
    data=config_lib.DataConfig(
      batch_size=TOKENS // LENGTH, sequence_length=LENGTH
    ),
    training=config_lib.TrainingConfig(num_steps=10_000),
    mesh=config_lib.MeshConfig(**({'data': 1} | {axis: num_devices})),
  )


def _row(axis: str, num_devices: int) -> pod_compilation.Row:
  run = config(axis, num_devices)
  found = pod_compilation.report(f'h200:{num_devices}', run)
  return found | {
    'kind': KIND,
    'axis': axis,
    'num_devices': num_devices,
    'sent_bytes': sum(x['bytes'] for x in found['collectives']),
    'formula_bytes': mesh_traffic.sent_bytes(
      run, axis, num_devices, reduce_scatter=True
    ),
  }


def run(path: pathlib.Path) -> Iterator[pod_compilation.Row]:
  """Adds the rows that are missing to a file, and yields them.

  The step of one device counts for every axis.

  Raises:
    ahead_of_time.ToolsMissingError: a compiler is not installed.
    ahead_of_time.CompilationError: a step does not compile.
  """
  rows = result_rows.read(path)
  done = {(row['axis'], row['num_devices']) for row in rows}
  for case in CASES:
    if case not in done:
      rows.append(_row(*case))
      result_rows.write(path, rows)
      yield rows[-1]


def describe(row: pod_compilation.Row) -> str:
  """Returns a line about a row."""
  return (
    f'{row["axis"]} {row["num_devices"]}: {row["flops"] / 1e12:.2f} TFLOP, '
    f'{row["memory_traffic_bytes"] / 1e9:.1f} GB moved, '
    f'{row["sent_bytes"] / 1e9:.4f} GB sent, by formula '
    f'{row["formula_bytes"] / 1e9:.4f}'
  )
