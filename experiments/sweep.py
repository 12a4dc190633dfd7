"""Runs a named sweep of synthetic tasks; the same command goes on where it was.

python -m experiments.sweep --sweep=mqar_cpu --output=results/mqar_cpu.jsonl
"""

import pathlib

from absl import app
from absl import flags

from experiments.synthetic import config as config_lib
from experiments.synthetic import configs
from experiments.synthetic import sweeping

_SWEEP = flags.DEFINE_enum('sweep', None, list(configs.SWEEPS), 'Its name.')
_OUTPUT = flags.DEFINE_string(
  'output', None, 'JSONL of the rows; unset: results/SWEEP.jsonl.'
)
_TOGETHER = flags.DEFINE_integer(
  'together', 1, 'Most runs that are trained at once, vectorised.', 1
)
_PROTOCOL = flags.DEFINE_enum(
  'protocol', 'published', ['published', 'clean'], 'How runs are selected.'
)


def main(argv: list[str]) -> None:
  """Runs what is left of the sweep."""
  if len(argv) > 1:
    raise app.UsageError(f'flags only, got the arguments {argv[1:]}')
  name = _SWEEP.value
  output = pathlib.Path(_OUTPUT.value or f'results/{name}.jsonl')
  try:
    runs = configs.SWEEPS[name]()
    if _PROTOCOL.value == 'clean':
      runs = [config_lib.clean(run) for run in runs]
    rows = sweeping.run_all(runs, output, most=_TOGETHER.value)
  except (OSError, ValueError) as error:
    raise SystemExit(f'error: {error}') from error
  for row in rows:
    print(sweeping.describe(row))


if __name__ == '__main__':
  flags.mark_flag_as_required('sweep')
  app.run(main)
