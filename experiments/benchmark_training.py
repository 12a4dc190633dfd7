"""Times training steps and decoding of every token mixer, and their state.

Example:
    python -m experiments.benchmark_training --suite=mixers \
        --output=results/mixers.jsonl
"""

from collections.abc import Sequence
import pathlib

from absl import app
from absl import flags

from experiments import atomic_file
from experiments import benchmarking
from experiments import mixer_benchmark

SIZES = ('model_width', 'num_layers', 'num_heads', 'batch', 'length')
_DEFAULT = mixer_benchmark.Sizes()


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_enum('suite', 'mixers', ('mixers',), 'What is timed.')
  flags.DEFINE_list('mixers', list(mixer_benchmark.MIXERS), 'Their names.')
  flags.DEFINE_string('output', None, 'JSONL; replaced after every row.')
  for name in ('model_width', 'num_layers', 'num_heads', 'batch', 'length'):
    flags.DEFINE_integer(name, getattr(_DEFAULT, name), f'The {name}.', 1)


def main(argv: Sequence[str]) -> None:
  """Prints a table and writes the rows."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  args = flags.FLAGS
  unknown = sorted(set(args.mixers) - set(mixer_benchmark.MIXERS))
  if unknown:
    known = ', '.join(mixer_benchmark.MIXERS)
    raise app.UsageError(f'mixers must be of {known}, got {unknown}')
  output = pathlib.Path(args.output) if args.output else None
  if output:
    output.parent.mkdir(parents=True, exist_ok=True)
  sizes = mixer_benchmark.Sizes(**{name: args[name].value for name in SIZES})
  print(mixer_benchmark.header())
  rows = []
  for row in mixer_benchmark.rows(sizes, args.mixers):
    print(mixer_benchmark.format_row(row), flush=True)
    rows.append(row)
    if output:
      atomic_file.replace(output, benchmarking.to_lines(rows))


if __name__ == '__main__':
  define_flags()
  app.run(main)
