"""Times the implementations of every op against one another, in one run.

Example:
    python -m experiments.benchmark_kernels --suite=cpu \
        --output=results/kernels_cpu.jsonl
"""

from collections.abc import Sequence
import pathlib

from absl import app
from absl import flags

from experiments import atomic_file
from experiments import benchmarking


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_enum(
    'suite', 'cpu', list(benchmarking.SUITES), 'Shapes to time.'
  )
  flags.DEFINE_string(
    'output', None, 'JSONL file of the results; replaced when all are in.'
  )
  flags.DEFINE_integer(
    'repeats', 15, 'Timed calls of each implementation.', lower_bound=1
  )


def main(argv: Sequence[str]) -> None:
  """Prints a table and writes the rows."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  args = flags.FLAGS
  output = pathlib.Path(args.output) if args.output else None
  if output:
    output.parent.mkdir(parents=True, exist_ok=True)
  print(benchmarking.header())
  rows = []
  specs = benchmarking.SUITES[args.suite]
  for row in benchmarking.rows(specs, repeats=args.repeats):
    print(benchmarking.format_row(row), flush=True)
    rows.append(row)
  if output:
    atomic_file.replace(output, benchmarking.to_lines(rows))


if __name__ == '__main__':
  define_flags()
  app.run(main)
