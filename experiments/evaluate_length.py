"""Measures the loss of finished runs by position, beyond their training length.

python -m experiments.evaluate_length --output=results/length.jsonl \
    --workdirs=runs/length/delta_net,runs/length/attention
"""

from collections.abc import Sequence

from absl import app
from absl import flags

from experiments import result_rows
from experiments.evaluation import length_extrapolation
from experiments.training import checkpoints


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_list(
    'workdirs', None, 'Directories of finished runs.', required=True
  )
  flags.DEFINE_string('output', None, 'JSONL; None: nothing is written.')
  flags.DEFINE_integer('times', 8, 'Greatest position, in training lengths.', 1)
  flags.DEFINE_integer(
    'max_scored', 4, 'Training lengths of tokens scored of a document.', 1
  )


def main(argv: Sequence[str]) -> None:
  """Prints a line per run and bucket of positions, and writes the rows."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  args = flags.FLAGS
  found = []
  try:
    for rows in length_extrapolation.rows(
      args.workdirs, times=args.times, max_scored=args.max_scored
    ):
      print(*map(length_extrapolation.format_row, rows), sep='\n', flush=True)
      found += rows
    result_rows.write(args.output, found)
  except (OSError, ValueError, checkpoints.CheckpointsDamagedError) as error:
    raise SystemExit(f'error: {error}') from error


if __name__ == '__main__':
  define_flags()
  app.run(main)
