"""The table of compiled train steps: DeltaNet by size, context and machine.

Every machine takes 2^20 tokens a step, in rows as long as the context; as many
chips as divide the rows share these, the others the tokens of a row
(`pod_compilation.with_mesh`). The remat policy is the one that keeps most and
leaves room.
"""

from collections.abc import Iterator, Sequence
import itertools
import json
import pathlib
from typing import NamedTuple

import deltanet_jax
from experiments import config as config_lib
from experiments import pod_compilation
from experiments import result_rows

TOKENS = 2**20
MODELS = ('340m', '1b', '3b', '7b')
CONTEXTS = (2048, 8192, 32_768, 131_072)
# A step compiles in two minutes for the first, in some ten for the second.
MACHINES = ('h200:64', 'v5p:4x4x4')


class Case(NamedTuple):
  """A row of the table."""

  model: str
  context: int
  machine: str

  @property
  def config(self) -> config_lib.TrainLMConfig:
    """The run whose step is compiled."""
    return config_lib.TrainLMConfig(
      model=deltanet_jax.preset('delta_net', self.model),
      data=config_lib.DataConfig(
        batch_size=TOKENS // self.context, sequence_length=self.context
      ),
      training=config_lib.TrainingConfig(num_steps=10_000),
    )


CASES = tuple(
  Case(model, context, machine)
  for machine, model, context in itertools.product(MACHINES, MODELS, CONTEXTS)
)


def case_of(row: pod_compilation.Row) -> Case:
  """Returns the case of a row."""
  return Case(row['model'], row['sequence_length'], row['target'])


def missing(
  path: pathlib.Path, machines: Sequence[str] = MACHINES
) -> list[Case]:
  """Returns the cases on some machines that the file has no row of."""
  done = {case_of(row) for row in result_rows.read(path)}
  return [c for c in CASES if c.machine in machines and c not in done]


def run(
  path: pathlib.Path, machines: Sequence[str] = MACHINES
) -> Iterator[pod_compilation.Row]:
  """Adds the rows that are missing to a file, and yields them.

  A run that is stopped goes on at the next call; two runs for different
  machines may write to the same file.

  Raises:
    ahead_of_time.ToolsMissingError: a compiler is not installed.
    ahead_of_time.CompilationError: a step does not compile.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  for case in missing(path, machines):
    row = pod_compilation.report(case.machine, case.config, choose_remat=True)
    row = {'model': case.model} | row
    with path.open('a') as file:
      file.write(json.dumps(row) + '\n')
    yield row
