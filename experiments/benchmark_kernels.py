"""Times the implementations of every op against one another, in one run.

Example:
    python -m experiments.benchmark_kernels --suite=paper --tokens=4096
"""

from collections.abc import Sequence

from absl import app
from absl import flags

from experiments import benchmark_suites
from experiments import benchmark_tables
from experiments import benchmarking
from experiments import kernel_tuning
from experiments import result_rows


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_enum('suite', 'cpu', benchmark_suites.SUITES, 'Cases to time.')
  flags.DEFINE_list('only', [], 'Names of its sizes; empty: all.')
  flags.DEFINE_bool('tune', False, 'Measure block sizes; write their table.')
  flags.DEFINE_string('output', None, 'JSONL; with --only other rows stay.')
  flags.DEFINE_integer('repeats', 15, 'Most timed calls of each.', 1)
  for name in ('tokens', 'model_width'):
    default = getattr(benchmark_suites, f'PAPER_{name.upper()}')
    flags.DEFINE_integer(name, default, 'Of the suite `paper`.', 1)


def main(argv: Sequence[str]) -> None:
  """Prints a table and writes the rows."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  args = flags.FLAGS
  if args.tune:
    for row in kernel_tuning.tune(args.output, args.repeats):
      print(kernel_tuning.format_row(row), flush=True)
    return
  settings = {n: getattr(args, n) for n in ('tokens', 'model_width', 'only')}
  suite = benchmark_suites.suite(args.suite, **settings)
  if args.only:
    result_rows.require_device(args.output)
  print(benchmark_tables.header())
  rows = []
  for row in benchmarking.rows(suite, repeats=args.repeats):
    print(*benchmark_tables.format_row(row), sep='\n', flush=True)
    rows.append(row)
    # After every row: what was measured outlives a time limit.
    if args.only:
      result_rows.update(args.output, rows, benchmarking.ABOUT)
    else:
      result_rows.write(args.output, rows)
  if suite.name == 'length':
    print(*benchmark_tables.growth_lines(rows), sep='\n')


if __name__ == '__main__':
  define_flags()
  app.run(main)
