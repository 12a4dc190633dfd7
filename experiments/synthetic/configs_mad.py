"""MAD in full: its 66 settings and the grid of 396 runs of a mixer.

Hours are estimates, not measured.
"""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any, NamedTuple

import deltanet_jax
from experiments.synthetic import config as config_lib
from experiments.synthetic import mad
from experiments.synthetic import mad_fuzzy
from experiments.synthetic import mad_memory

RATES = (1e-4, 5e-4, 1e-3)
DECAYS = (0.0, 0.1)
_SEED = 12345
_FEWER = (6400, 3200, 1600, 800)
_HEADS = {'attention': 16}


class Task(NamedTuple):
  """A task of MAD: a baseline and what is changed in it, one at a time.

  Attributes:
    kind: class of its configurations, whose defaults are the baseline.
    trains_on_all: its training examples have `scores_all`.
    num_train: examples of the baseline.
    fewer: other numbers of training examples.
    changes: values of fields of `kind`.
  """

  kind: Callable[..., Any]
  trains_on_all: bool
  num_train: int
  fewer: tuple[int, ...]
  changes: dict[str, tuple]


TASKS: dict[str, Task] = {
  'compression': Task(
    mad_memory.CompressionConfig,
    False,
    12_800,
    _FEWER,
    {'vocab_size': (32, 64, 128), 'sequence_length': (64, 128, 256)},
  ),
  'fuzzy_recall': Task(
    mad_fuzzy.FuzzyRecallConfig,
    True,
    12_800,
    _FEWER,
    {'vocab_size': (32, 64, 128), 'sequence_length': (256, 512, 1024)},
  ),
  'in_context_recall': Task(
    mad.RecallConfig,
    True,
    12_800,
    _FEWER,
    {'vocab_size': (32, 64, 128), 'length': (256, 512, 1024)},
  ),
  'memorization': Task(
    mad_memory.MemorizationConfig,
    False,
    256,
    (),
    {'vocab_size': (512, 1024, 2048, 4096, 8192)},
  ),
  'noisy_recall': Task(
    mad.NoisyRecallConfig,
    True,
    12_800,
    _FEWER,
    {
      'vocab_size': (48, 80, 144),
      'length': (256, 512, 1024),
      'noise_fraction': (0.4, 0.6, 0.8),
    },
  ),
  'selective_copying': Task(
    mad.SelectiveCopyingConfig,
    False,
    12_800,
    _FEWER,
    {
      'vocab_size': (32, 64, 128),
      'sequence_length': (512, 1024),
      'num_copied': (32, 64, 96),
    },
  ),
}


def settings(name: str) -> Iterator[tuple[dict[str, Any], int]]:
  """Yields (changed fields, training examples), the baseline first."""
  task = TASKS[name]
  yield {}, task.num_train
  for field, values in task.changes.items():
    for value in values:
      yield {field: value}, task.num_train
  for number in task.fewer:
    yield {}, number


def run(
  name: str,
  mixer: str = 'delta_net',
  *,
  changes: dict[str, Any] | None = None,
  num_train: int | None = None,
) -> config_lib.RunConfig:
  """One run, of the baseline unless fields of the task are changed.

  Two layers of width 128, a SwiGLU of 352, 200 epochs of batches of 128 at a
  constant rate, the macro average at the epoch of the lowest test loss. The
  authors have no DeltaNet in their files; one head with convolutions is ours.

  Raises:
    ValueError: there is no such task.
  """
  if name not in TASKS:
    raise ValueError(f'task must be one of {", ".join(TASKS)}, got {name!r}')
  task = TASKS[name]
  test = task.kind(**(changes or {}))
  train = (
    dataclasses.replace(test, scores_all=True) if task.trains_on_all else test
  )
  decodes = name == 'compression'
  return config_lib.RunConfig(
    name=name,
    task=train,
    test_task=test,
    model=deltanet_jax.ModelConfig(
      model_width=128,
      num_layers=2,
      num_heads=_HEADS.get(mixer, 1),
      mixers=(mixer,),
      mlp_width=352,
      norm_eps=1e-5,
      dtype='bfloat16',
    ),
    block=config_lib.BlockConfig(
      output_bias=True, readout='auto_encoder' if decodes else 'tokens'
    ),
    training=config_lib.TrainingConfig(
      num_train=num_train or task.num_train,
      num_test=1280,
      batch_size=128,
      num_epochs=200,
      learning_rate=5e-4,
      weight_decay=0.0,
      metric='macro',
      selection='lowest_loss',
      stop_accuracy=0.999,
      seed=_SEED,
      data_seed=_SEED,
    ),
  )


def mad_paper() -> list[config_lib.RunConfig]:
  """The paper's table of MAD: DeltaNet, 66 settings, 3 rates, 2 decays.

  python -m experiments.sweep --sweep=mad_paper --together=6

  One H100, some 20 hours for the 396 runs. A task's score is the mean over its
  settings of the best of the six runs. Expected, per cent: compression 42.2,
  fuzzy recall 35.7, in-context recall 100, memorization 52.8, noisy recall 100,
  selective copying 100. `--protocol=clean` selects on a validation set, takes
  the average per token and a cosine, so its numbers are others.
  """
  runs = []
  for name in TASKS:
    for changes, number in settings(name):
      one = run(name, changes=changes, num_train=number)
      for rate in RATES:
        for decay in DECAYS:
          training = dataclasses.replace(
            one.training, learning_rate=rate, weight_decay=decay
          )
          runs.append(dataclasses.replace(one, training=training))
  return runs


def mad_gpu() -> list[config_lib.RunConfig]:
  """DeltaNet on the six baseline settings of MAD: one GPU; not measured.

  python -m experiments.sweep --sweep=mad_gpu

  The two higher rates and no weight decay. The published scores are means over
  all settings of a task, so these are no measure of them.
  """
  return [
    dataclasses.replace(
      one, training=dataclasses.replace(one.training, learning_rate=rate)
    )
    for one in map(run, TASKS)
    for rate in RATES[1:]
  ]
