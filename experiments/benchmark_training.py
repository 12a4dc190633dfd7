"""Times training steps of the mixers, or of the paper's 1.3B models.

python -m experiments.benchmark_training --suite=throughput --models=delta_net
"""

from collections.abc import Sequence

from absl import app
from absl import flags

from experiments import mixer_benchmark
from experiments import result_rows
from experiments import training_throughput


def define_flags() -> None:
  """Defines the flags of this program."""
  suites = ('mixers', 'throughput')
  flags.DEFINE_enum('suite', 'mixers', suites, 'What is timed.')
  flags.DEFINE_string(
    'output', None, 'JSONL, written after every row; others stay.'
  )
  flags.DEFINE_list('mixers', list(mixer_benchmark.MIXERS), 'Of mixers.')
  sizes = mixer_benchmark.Sizes()
  for name in mixer_benchmark.SIZE_FLAGS:
    flags.DEFINE_integer(name, getattr(sizes, name), 'Of mixers.', 1)
  for name in ('models', 'lengths', 'meshes', 'remats'):
    values = getattr(training_throughput, name.upper())
    flags.DEFINE_list(name, list(map(str, values)), 'Of throughput.')
  flags.DEFINE_string('size', '1b', 'Of the presets, of throughput.')
  flags.DEFINE_integer('tokens', 16384, 'Of throughput, per device.', 1)


def main(argv: Sequence[str]) -> None:
  """Prints a table and writes the rows."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  args = flags.FLAGS
  result_rows.require_device(args.output)
  if args.suite == 'throughput':
    table = training_throughput
    what = table.settings(args.size, args.tokens, args.meshes)
    found = table.rows(what, args.models, map(int, args.lengths), args.remats)
  else:
    table = mixer_benchmark
    names = table.SIZE_FLAGS
    what = table.Sizes(**{name: args[name].value for name in names})
    found = table.rows(what, args.mixers)
  print(table.header())
  rows = []
  for row in found:
    print(table.format_row(row), flush=True)
    rows.append(row)
    result_rows.update(args.output, rows, table.ABOUT)


if __name__ == '__main__':
  define_flags()
  app.run(main)
