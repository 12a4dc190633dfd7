"""Trains a language model; the same command resumes an interrupted run.

python -m experiments.train_lm --config=laptop --workdir=runs/laptop
python -m experiments.train_lm --config=laptop --workdir=DIR --model.head_dim=64
"""

from absl import app
from absl import flags
from absl import logging

from experiments import compilation_cache
from experiments import config as config_lib
from experiments import config_flags
from experiments import configs
from experiments.training import checkpoints
from experiments.training import loop
from experiments.training import processes
from experiments.training import workdir as workdir_lib

_CONFIG = flags.DEFINE_enum(
  'config', 'laptop', list(configs.TRAIN_LM), 'Named configuration.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run.', required=True
)
_ERRORS = (
  ImportError,
  OSError,
  ValueError,
  checkpoints.CheckpointsDamagedError,
  checkpoints.SaveFailedError,
  loop.TrainingStoppedError,
  workdir_lib.WorkdirBusyError,
)


def main(argv: list[str]) -> None:
  """Runs the configuration with the flags put in."""
  if len(argv) > 1:
    raise app.UsageError(f'flags only, got the arguments {argv[1:]}')
  logging.set_verbosity(logging.INFO)
  workdir = _WORKDIR.value
  try:
    config = config_flags.override(configs.TRAIN_LM[_CONFIG.value]())
    runtime = config_flags.override(config_lib.RuntimeConfig())
    compilation_cache.keep_in(runtime.compilation_cache)
    with processes.joined(runtime, workdir, one_line=_ERRORS) as group:
      said = loop.train(
        config, workdir, group=group, watchdog_seconds=runtime.watchdog_seconds
      )
      if group.is_primary:
        print(said)
  except _ERRORS as error:
    raise SystemExit(f'error: {error}') from error


if __name__ == '__main__':
  config_flags.define_flags(config_lib.TrainLMConfig)
  config_flags.define_flags(config_lib.RuntimeConfig)
  app.run(main)
