"""Trains one model on a synthetic task and prints its row of results.

python -m experiments.train_synthetic --task=mqar --config=cpu --mixer=delta_net
"""

import dataclasses
import pathlib
import sys

from absl import app
from absl import flags

from experiments import config_flags
from experiments.synthetic import config as config_lib
from experiments.synthetic import configs
from experiments.synthetic import sweeping

_TASK = flags.DEFINE_string('task', None, 'Name of the task.', required=True)
_CONFIG = flags.DEFINE_string('config', 'cpu', 'Its size: cpu or paper.')
_MIXER = flags.DEFINE_string('mixer', 'delta_net', 'Name of the token mixer.')
_PROTOCOL = flags.DEFINE_enum(
  'protocol', 'published', ['published', 'clean'], 'How the run is selected.'
)
_OUTPUT = flags.DEFINE_string(
  'output', None, 'JSONL that gets the row; unset: runs/synthetic.jsonl.'
)


def main(argv: list[str]) -> None:
  """Trains the configuration with the flags put in."""
  if len(argv) > 1:
    raise app.UsageError(f'flags only, got the arguments {argv[1:]}')
  try:
    run = configs.build(_TASK.value, _CONFIG.value, _MIXER.value)
    training = config_flags.override(run.training, prefix='training.')
    run = dataclasses.replace(run, training=training)
    if _PROTOCOL.value == 'clean':
      run = config_lib.clean(run)
    output = pathlib.Path(_OUTPUT.value or 'runs/synthetic.jsonl')
    rows = sweeping.run_all([run], output)
  except (OSError, ValueError) as error:
    raise SystemExit(f'error: {error}') from error
  sys.stdout.write(sweeping.describe(rows[0]) + '\n')


if __name__ == '__main__':
  config_flags.define_flags(config_lib.TrainingConfig, prefix='training.')
  app.run(main)
