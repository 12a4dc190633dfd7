"""Trains twice and compares every bit, with XLA flags set and not set.

Each run is a process of its own, as flags are read when JAX starts and what is
chosen by timing (autotuning) is chosen anew.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp

import deltanet_jax
from experiments import config as config_lib
from experiments import result_rows
from experiments.training import train_step

Row = dict[str, Any]

KIND = 'reproducibility'
# XLA's flags by the name of a setting.
SETTINGS: Mapping[str, str] = {
  'default': '',
  'deterministic': '--xla_gpu_deterministic_ops=true',
  'no_autotuning': '--xla_gpu_autotune_level=0',
  'deterministic_no_autotuning': (
    '--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0'
  ),
}

_HEAD_WIDTH = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What is trained: a DeltaNet in bfloat16 on random tokens.

  Attributes:
    steps: optimizer steps.
    model_width: D; heads are 128 wide, or as wide as the model.
    num_layers: layers.
    batch: rows of a step.
    length: tokens of a row.
  """

  steps: int = 50
  model_width: int = 512
  num_layers: int = 4
  batch: int = 8
  length: int = 1024

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value < 1:
        raise ValueError(f'{field.name} must be at least 1, got {value}')


def _config(run: Run) -> config_lib.TrainLMConfig:
  return config_lib.TrainLMConfig(
    model=deltanet_jax.ModelConfig(
      vocab_size=256,
      model_width=run.model_width,
      num_layers=run.num_layers,
      num_heads=max(1, run.model_width // _HEAD_WIDTH),
      dtype='bfloat16',
    ),
    data=config_lib.DataConfig(
      batch_size=run.batch, sequence_length=run.length
    ),
    optimizer=config_lib.OptimizerConfig(warmup_steps=0),
    training=config_lib.TrainingConfig(num_steps=run.steps),
  )


def _digest(tree: Any) -> str:
  """Returns a hash of all bits of a tree of arrays."""
  found = hashlib.sha256()
  for x in jax.tree.leaves(jax.device_get(tree)):
    found.update(x.tobytes())
  return found.hexdigest()


def train(run: Run) -> Row:
  """Trains in this process; returns `losses`, `parameters` and the origin.

  Losses are exact, as hexadecimal; parameters are a hash.
  """
  config = _config(run)
  state = jax.jit(lambda: train_step.init_state(config))()
  step = train_step.build(config)
  losses = []
  for i in range(run.steps):
    shape = (run.batch, run.length + 1)
    key = jax.random.fold_in(jax.random.key(1), i)
    tokens = jax.random.randint(key, shape, 0, 256, jnp.int32)
    batch = {'tokens': tokens, 'segment_ids': jnp.ones(shape, jnp.int32)}
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']).hex())
  return {
    'losses': losses,
    'parameters': _digest(state['params']),
    **result_rows.origin(),
  }


def _child(run: Run, xla_flags: str, command: Sequence[str]) -> Row:
  """Returns what `train` found in a new process with such flags.

  Raises:
    RuntimeError: it failed; the end of its output.
  """
  flags = f'{os.environ.get("XLA_FLAGS", "")} {xla_flags}'.strip()
  sizes = [f'--{name}={x}' for name, x in dataclasses.asdict(run).items()]
  found = subprocess.run(
    [sys.executable, '-m', *command, *sizes],
    env=os.environ | {'XLA_FLAGS': flags},
    capture_output=True,
    text=True,
  )
  if found.returncode:
    raise RuntimeError(f'a run failed with {flags!r}: {found.stderr[-2000:]}')
  return json.loads(found.stdout.splitlines()[-1])


def _first_difference(first: Row, second: Row) -> int | None:
  pairs = zip(first['losses'], second['losses'], strict=True)
  return next((i for i, (a, b) in enumerate(pairs) if a != b), None)


def compare(setting: str, run: Run, first: Row, second: Row) -> Row:
  """Returns a row of results: what of two runs agrees in every bit."""
  origin = {
    name: x
    for name, x in second.items()
    if name not in ('losses', 'parameters')
  }
  return {
    'kind': KIND,
    'setting': setting,
    'xla_flags': SETTINGS[setting],
    'run': dataclasses.asdict(run),
    'losses_equal': first['losses'] == second['losses'],
    'parameters_equal': first['parameters'] == second['parameters'],
    'first_different_step': _first_difference(first, second),
    'last_losses': [
      float.fromhex(found['losses'][-1]) for found in (first, second)
    ],
    **origin,
  }


def rows(
  run: Run, settings: Sequence[str], command: Sequence[str]
) -> Iterator[Row]:
  """Yields a row per setting.

  Args:
    run: what is trained.
    settings: of `SETTINGS`.
    command: module and flags of a program that prints `train` of the sizes
      that it is given as flags, as JSON in its last line.

  Raises:
    ValueError: there is no such setting.
    RuntimeError: a run failed.
  """
  unknown = sorted(set(settings) - set(SETTINGS))
  if unknown:
    raise ValueError(f'settings must be of {tuple(SETTINGS)}, got {unknown}')
  for name in settings:
    first, second = (_child(run, SETTINGS[name], command) for _ in range(2))
    yield compare(name, run, first, second)


def format_row(row: Row) -> str:
  """Returns a row as a line."""
  words = {True: 'the same', False: 'different'}
  return (
    f'{row["setting"]}: losses {words[row["losses_equal"]]}, parameters '
    f'{words[row["parameters_equal"]]} after {row["run"]["steps"]} steps on '
    f'{row["device"]}'
  )
