"""A training run of seconds, as a config and as a command."""

import dataclasses
import json
import os
import pathlib
import random
import socket
import subprocess
import sys

import deltanet_jax
from experiments import config as config_lib
from experiments import environment as environment_lib
from experiments.training import metrics as metrics_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_STEPS = 60
EVALUATION_STEPS = (20, 40, 60)

_TIMES = ('seconds', 'wall_seconds', 'goodput')
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
      files=(files,), held_out_modulus=5, sequence_length=32, batch_size=2
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


def command(base: config_lib.TrainLMConfig, workdir: pathlib.Path) -> list[str]:
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
  """Waits for a program, at most five minutes; returns what it printed."""
  with process:
    try:
      output, errors = process.communicate(timeout=300)
    finally:
      process.kill()
  return subprocess.CompletedProcess(
    process.args, process.returncode, output, errors
  )


class Killed(BaseException):
  """Ends a run where it stands, as a kill does."""


def rows_of(root):
  """Returns the rows of a run without their times, which differ."""
  rows = metrics_lib.read_rows(root / 'metrics.jsonl')
  return [
    {name: value for name, value in row.items() if name not in _TIMES}
    for row in rows
  ]


def assert_same_rows(root, finished_run):
  """Every row is there once and equals, bit for bit, the undisturbed one."""

  def by_step(rows):
    return sorted(rows, key=lambda row: (row['step'], row['kind']))

  rows = rows_of(root)
  assert by_step(rows) == by_step(rows_of(finished_run.root))
  train = [row['step'] for row in rows if row['kind'] == 'train']
  assert train == list(range(1, NUM_STEPS + 1))
  evaluated = [row['step'] for row in rows if row['kind'] == 'eval']
  assert evaluated == list(EVALUATION_STEPS)


def contents(root):
  """Returns the bytes of every file of a run but its lock."""
  return {
    path: path.read_bytes()
    for path in root.rglob('*')
    if path.is_file() and path.name != '.lock'
  }


def saved_steps(root):
  """Returns the steps of the checkpoints of a run."""
  names = [path.name for path in (root / 'checkpoints').iterdir()]
  return sorted(int(name) for name in names if name.isdigit())


def before(monkeypatch, owner, name, action):
  """Calls `action` with the arguments of a function before it runs."""
  function = getattr(owner, name)

  def wrapped(*args, **kwargs):
    action(*args, **kwargs)
    return function(*args, **kwargs)

  monkeypatch.setattr(owner, name, wrapped)


def record(name: str, counts: dict[str, int]) -> None:
  """Appends counts to results/, if the environment says RECORD_DRILLS."""
  if not os.environ.get('RECORD_DRILLS'):
    return
  row = counts | {
    'commit': environment_lib.commit(),
    'device': environment_lib.devices(),
    'versions': environment_lib.versions(),
  }
  path = ROOT / 'results' / f'{name}.jsonl'
  path.parent.mkdir(exist_ok=True)
  with path.open('a') as file:
    file.write(json.dumps(row) + '\n')


def free_port() -> int:
  """Returns a port of this machine that nobody listens on."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def start_processes(
  base: config_lib.TrainLMConfig,
  workdir: pathlib.Path,
  cache: pathlib.Path,
  *,
  count: int,
  devices: int = 1,
  flags: tuple[str, ...] = (),
) -> list[subprocess.Popen]:
  """Starts a run of several processes on this machine, over gloo.

  Args:
    base: of the run.
    workdir: of the run.
    cache: directory of compiled programs.
    count: of processes.
    devices: that each process has.
    flags: more of them.
  """
  address = f'127.0.0.1:{free_port()}'
  arguments = [
    *command(base, workdir),
    f'--coordinator_address={address}',
    f'--num_processes={count}',
    *flags,
  ]
  variables = environment(cache) | {
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'
  }
  return [
    subprocess.Popen(
      [*arguments, f'--process_id={index}'],
      cwd=ROOT,
      env=variables,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def wait_for_step(process: subprocess.Popen, step: int | None = None) -> None:
  """Reads what a run shows until it is at a step, by default at any."""
  start = 'step ' if step is None else f'step {step}/'
  shown = []
  for line in process.stderr:
    shown.append(line)
    if line.startswith(start):
      return
  raise AssertionError(f'the run ended before: {"".join(shown)}')


def assert_near_rows(root, other_root, *, tolerance=1e-5) -> None:
  """Every row is there once, with the other run's tokens and losses."""

  def sorted_rows(directory):
    return sorted(rows_of(directory), key=lambda r: (r['step'], r['kind']))

  found, expected = sorted_rows(root), sorted_rows(other_root)
  for name in ('step', 'kind', 'tokens'):
    assert [row[name] for row in found] == [row[name] for row in expected]
  for one, other in zip(found, expected, strict=True):
    difference = abs(one['loss'] - other['loss'])
    assert difference <= tolerance * abs(other['loss']), (one, other)
