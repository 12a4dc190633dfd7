"""A training run of seconds, as a config and as a command."""

import dataclasses
import os
import pathlib
import random
import subprocess
import sys

import deltanet_jax
from experiments import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_STEPS = 60
EVALUATION_STEPS = (20, 40, 60)

_WORDS = 'def return value list of the a map state key with snake'.split()


def write_corpus(directory: pathlib.Path) -> str:
  """Writes twelve short texts; returns the glob pattern of them."""
  directory.mkdir(parents=True)
  draw = random.Random(0)
  for index in range(12):
    text = ' '.join(draw.choices(_WORDS, k=120))
    (directory / f'{index}.txt').write_text(f'{text}\n')
  return f'{directory}/*.txt'


def config(files: str) -> config_lib.TrainLMConfig:
  return config_lib.TrainLMConfig(
    model=deltanet_jax.ModelConfig(
      vocab_size=257,
      model_width=16,
      num_layers=1,
      num_heads=2,
      mlp_width=16,
      dtype='float32',
    ),
    data=config_lib.DataConfig(
      files=(files,), held_out_modulus=4, sequence_length=32, batch_size=2
    ),
    optimizer=config_lib.OptimizerConfig(
      peak_learning_rate=1e-2, warmup_steps=5
    ),
    training=config_lib.TrainingConfig(
      num_steps=NUM_STEPS, log_every_steps=20, spike_window=16
    ),
    evaluation=config_lib.EvaluationConfig(
      every_steps=20, num_tokens=200, context_length=64, batch_size=2
    ),
    checkpoint=config_lib.CheckpointConfig(every_steps=10),
  )


def replace(
  base: config_lib.TrainLMConfig, section: str, **changes
) -> config_lib.TrainLMConfig:
  """Returns the config with fields of one section changed."""
  part = dataclasses.replace(getattr(base, section), **changes)
  return dataclasses.replace(base, **{section: part})


def _flags(values: dict, prefix: str = '') -> list[str]:
  flags = []
  for name, value in values.items():
    if isinstance(value, dict):
      flags += _flags(value, f'{prefix}{name}.')
    elif isinstance(value, list):
      flags.append(f'--{prefix}{name}={",".join(value)}')
    else:
      flags.append(f'--{prefix}{name}={value}')
  return flags


def program(name: str) -> list[str]:
  """Returns the start of the command line of a program."""
  return [sys.executable, '-m', f'experiments.{name}']


def command(
  base: config_lib.TrainLMConfig, workdir: pathlib.Path
) -> list[str]:
  """Returns the command that trains the config, every field spelled out."""
  return [
    *program('train_lm'),
    f'--workdir={workdir}',
    *_flags(config_lib.to_dict(base)),
  ]


def environment(cache: pathlib.Path) -> dict[str, str]:
  """Returns the variables of a run that compiles only what is not cached."""
  return os.environ | {
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


def start(
  arguments: list[str], cache: pathlib.Path, **options
) -> subprocess.Popen:
  """Starts a program of the project."""
  return subprocess.Popen(
    arguments,
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
  """Waits for a program, at most two minutes; returns what it printed."""
  with process:
    try:
      output, errors = process.communicate(timeout=120)
    finally:
      process.kill()
  return subprocess.CompletedProcess(
    process.args, process.returncode, output, errors
  )
