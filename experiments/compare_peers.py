"""Times this project's gated delta rule beside that of other JAX packages.

Example:
    pip install '.[peers]'
    python -m experiments.compare_peers --output=results/peers_cpu.jsonl
"""

from collections.abc import Sequence

from absl import app
from absl import flags

from experiments import benchmark_suites
from experiments import peers
from experiments import result_rows


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_string(
    'output', None, 'JSONL file of the results; replaced when all are in.'
  )
  flags.DEFINE_integer(
    'repeats', 15, 'Timed calls of each package.', lower_bound=1
  )


def main(argv: Sequence[str]) -> None:
  """Prints a line per package and size, and writes the rows."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  args = flags.FLAGS
  rows = []
  for case in benchmark_suites.suite('cpu').cases:
    if (case.op, case.gate) == ('delta_rule', 'head'):
      for row in peers.rows(case, repeats=args.repeats):
        print(peers.format_row(row), flush=True)
        rows.append(row)
  result_rows.write(args.output, rows)


if __name__ == '__main__':
  define_flags()
  app.run(main)
