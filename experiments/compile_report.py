"""Says what a train step takes of machines that are not there.

No such machine is needed, `make setup_aot` is. All else are flags as of
`train_lm`; without one of the mesh, `pod_compilation.with_mesh` lays it.
  python -m experiments.compile_report --config=delta_net_1b --target=v5p:4x4x4
  python -m experiments.compile_report --config=delta_net_340m --target=h200:8
  python -m experiments.compile_report --suite=models      the table of results/
  python -m experiments.compile_report --suite=scaling     over 1 to 8 devices
"""

from collections.abc import Sequence
import json

from absl import app
from absl import flags

from experiments import compile_tables
from experiments import config as config_lib
from experiments import config_flags
from experiments import configs
from experiments import pod_compilation


def define_flags() -> None:
  """Defines the flags of this program."""
  config_flags.define_flags(config_lib.TrainLMConfig)
  flags.DEFINE_enum(
    'config', 'delta_net_1b', list(configs.TRAIN_LM), 'Named configuration.'
  )
  flags.DEFINE_list('target', None, 'v5p:4x4x4, h200:64 ...; of a suite, some.')
  flags.DEFINE_bool('json', False, 'Print one object, not lines.')
  flags.DEFINE_enum(
    'suite', None, list(compile_tables.SUITES), 'Adds what is missing.'
  )
  flags.DEFINE_string('output', '', 'JSONL of a suite; empty: in results/.')


def main(argv: Sequence[str]) -> int:
  """Prints what was found; returns 1 if the step does not fit, else 0."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  args = flags.FLAGS
  try:
    if args.suite:
      for line in compile_tables.SUITES[args.suite](args.output, args.target):
        print(line, flush=True)
      return 0
    config = config_flags.override(configs.TRAIN_LM[args.config]())
    (target,) = args.target or ['h200:8']
    row = pod_compilation.report(target, config)
  except (ValueError, RuntimeError) as error:
    raise SystemExit(f'error: {error}') from error
  lines = [json.dumps(row)] if args.json else compile_tables.describe(row)
  print(*lines, sep='\n')
  return int(not row['fits'])


if __name__ == '__main__':
  define_flags()
  app.run(main)
