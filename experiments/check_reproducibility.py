"""Says whether two runs of training agree in every bit, by XLA's flags.

Example:
    python -m experiments.check_reproducibility \
        --output=results/reproducibility.jsonl
"""

from collections.abc import Sequence
import dataclasses
import json

from absl import app
from absl import flags

from experiments import reproducibility
from experiments import result_rows

COMMAND = ('experiments.check_reproducibility', '--train')


def define_flags() -> None:
  """Defines the flags of this program."""
  settings = list(reproducibility.SETTINGS)
  flags.DEFINE_list('settings', settings, 'Names of sets of XLA flags.')
  flags.DEFINE_string('output', None, 'JSONL; replaced after every row.')
  flags.DEFINE_bool('train', False, 'Train once, here, and print the result.')
  for field in dataclasses.fields(reproducibility.Run):
    text = f'The {field.name} of what is trained.'
    flags.DEFINE_integer(field.name, field.default, text, 1)


def main(argv: Sequence[str]) -> None:
  """Prints a line per setting and writes the rows."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  args = flags.FLAGS
  names = [field.name for field in dataclasses.fields(reproducibility.Run)]
  run = reproducibility.Run(**{name: args[name].value for name in names})
  if args.train:
    print(json.dumps(reproducibility.train(run)))
    return
  rows = []
  for row in reproducibility.rows(run, args.settings, COMMAND):
    print(reproducibility.format_row(row), flush=True)
    rows.append(row)
    result_rows.write(args.output, rows)


if __name__ == '__main__':
  define_flags()
  app.run(main)
