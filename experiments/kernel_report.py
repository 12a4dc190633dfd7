"""Prints what the Hopper kernels take of a GPU; fails if a gate is broken.

No GPU is needed, `make setup_aot` is. Example:
    python -m experiments.kernel_report --target=h200
"""

from collections.abc import Sequence
import json

from absl import app
from absl import flags

from experiments import ahead_of_time
from experiments import kernel_compilation
from experiments import kernel_tables
from experiments import result_rows


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_enum(
    'target', 'h200', tuple(ahead_of_time.TARGETS), 'What is compiled for.'
  )
  flags.DEFINE_bool('json', False, 'Print an object a line, not a table.')
  flags.DEFINE_string(
    'output', None, 'JSONL; None: results/mosaic_gpu_<target>_aot.jsonl.'
  )


def main(argv: Sequence[str]) -> int:
  """Prints and writes the rows; returns 1 if a gate is broken, else 0."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  args = flags.FLAGS
  output = args.output or f'results/mosaic_gpu_{args.target}_aot.jsonl'
  if not args.json:
    print(kernel_tables.header())
  rows = []
  for row in kernel_compilation.all_rows(args.target):
    line = json.dumps(row) if args.json else kernel_tables.format_row(row)
    print(line, flush=True)
    rows.append(row)
  if not args.json:
    print(*kernel_tables.totals(rows), sep='\n')
    print(*kernel_tables.broken(rows), sep='\n')
  result_rows.write(output, rows)
  return int(any(row['broken'] for row in rows))


if __name__ == '__main__':
  define_flags()
  app.run(main)
