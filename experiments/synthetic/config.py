"""Frozen configurations of one run of a synthetic task."""

import dataclasses
import hashlib
import json
from typing import Any, Literal

import deltanet_jax
from deltanet_jax import mixers as mixers_lib
from deltanet_jax.layers import options

Norm = Literal['rms', 'layer']
Positions = Literal['none', 'learned']
Readout = Literal['tokens', 'auto_encoder']
Schedule = Literal['constant', 'cosine', 'cosine_by_epoch']
Metric = Literal['token', 'example', 'macro', 'sequence', 'dfa']
Selection = Literal['best', 'lowest_loss', 'last']
Protocol = Literal['published', 'clean']

# What may differ between runs that are trained in one vectorised program.
VARIED = ('learning_rate', 'weight_decay', 'seed')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
  """What the authors' models do differently from `deltanet_jax.LanguageModel`.

  The defaults are that model's. Zoology (MQAR) has layer normalisation and the
  identity as its state mixer, MAD an output bias and, for its compression task,
  the auto-encoder.

  Attributes:
    norm: `rms`, or `layer`: layer normalisation with bias, epsilon 1e-5.
    identity_state_mixer: in the place of the SwiGLU, the normalised stream
      itself is added, x += norm(x).
    positions: `learned`: a table of positions is added to the embedding.
    embedding_dropout: rate of dropout behind the embedding.
    output_bias: the output projection has a bias.
    readout: `tokens`: logits at every position; `auto_encoder`: the last
      position's state alone is decoded into all tokens.
  """

  norm: Norm = 'rms'
  identity_state_mixer: bool = False
  positions: Positions = 'none'
  embedding_dropout: float = 0.0
  output_bias: bool = False
  readout: Readout = 'tokens'

  def __post_init__(self):
    for name, choices in (
      ('norm', Norm),
      ('positions', Positions),
      ('readout', Readout),
    ):
      options.require_choice(self, name, choices)
    if not 0 <= self.embedding_dropout < 1:
      raise ValueError(
        f'embedding_dropout must be in [0, 1), got {self.embedding_dropout}'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """Optimisation and evaluation of a run.

  Attributes:
    num_train: examples of an epoch.
    num_test: examples of the test set.
    batch_size: examples of a step.
    num_epochs: the most epochs.
    fresh_data: every epoch has new examples; otherwise all have the same.
    shuffle: examples come in another order in every epoch.
    learning_rate: the highest.
    weight_decay: AdamW's, on all parameters.
    b2: AdamW's.
    schedule: `constant`; `cosine`, by step; `cosine_by_epoch`, by epoch.
    warmup_steps: steps in which the rate rises linearly, whatever the schedule.
    final_ratio: last rate of a cosine, as a part of the highest.
    clip_norm: bound of the gradient's norm; 0: none.
    metric: which accuracy is reported, see `synthetic.metrics`.
    selection: the epoch that is reported: `best` has the highest accuracy,
      `lowest_loss` the lowest loss, `last` is the last.
    stop_accuracy: the run ends after an epoch with at least this accuracy;
      above 1: never.
    seed: of the parameters and the dropout.
    data_seed: of the examples and their order.
  """

  num_train: int = 100_000
  num_test: int = 3_000
  batch_size: int = 128
  num_epochs: int = 64
  fresh_data: bool = False
  shuffle: bool = True
  learning_rate: float = 1e-3
  weight_decay: float = 0.1
  b2: float = 0.999
  schedule: Schedule = 'constant'
  warmup_steps: int = 0
  final_ratio: float = 0.0
  clip_norm: float = 0.0
  metric: Metric = 'token'
  selection: Selection = 'best'
  stop_accuracy: float = 2.0
  seed: int = 0
  data_seed: int = 123

  def __post_init__(self):
    options.require_at_least(
      self, 1, 'num_train', 'num_test', 'batch_size', 'num_epochs'
    )
    options.require_at_least(
      self, 0, 'weight_decay', 'warmup_steps', 'clip_norm', 'seed', 'data_seed'
    )
    options.require_above(self, 0, 'learning_rate')
    options.require_choice(self, 'schedule', Schedule)
    options.require_choice(self, 'metric', Metric)
    options.require_choice(self, 'selection', Selection)
    if self.batch_size > self.num_train:
      raise ValueError(
        'batch_size must be at most num_train, got '
        f'{self.batch_size} and {self.num_train}'
      )

  @property
  def steps_per_epoch(self) -> int:
    """Full batches of an epoch; a smaller last one is left out."""
    return self.num_train // self.batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """One run: a task, a model, how it is trained.

  Attributes:
    name: of the published experiment it belongs to, such as `mqar`; what
      figures are drawn by.
    task: configuration of the training examples, of `synthetic.tasks`.
    test_task: of the test examples.
    model: its vocabulary is the task's, whatever is given.
    block: what differs from `deltanet_jax.LanguageModel`.
    training: see there.
    protocol: `published`: the epoch is selected, and training stopped, on the
      test set; `clean`: on a validation set drawn for that.
  """

  name: str
  task: Any
  test_task: Any
  model: deltanet_jax.ModelConfig
  block: BlockConfig = BlockConfig()
  training: TrainingConfig = TrainingConfig()
  protocol: Protocol = 'published'

  def __post_init__(self):
    options.require_choice(self, 'protocol', Protocol)
    unknown = [x for x in self.model.mixers if x not in mixers_lib.MIXERS]
    if unknown:
      raise ValueError(
        f'mixer must be one of {", ".join(mixers_lib.MIXERS)}, got {unknown}'
      )
    if self.task.vocab_size != self.test_task.vocab_size:
      raise ValueError(
        'task and test_task must have the same vocab_size, got '
        f'{self.task.vocab_size} and {self.test_task.vocab_size}'
      )

  @property
  def resolved_model(self) -> deltanet_jax.ModelConfig:
    """The model with the vocabulary of the task."""
    return dataclasses.replace(self.model, vocab_size=self.task.vocab_size)

  @property
  def max_length(self) -> int:
    """Tokens of the longest row that is trained or tested."""
    return max(self.task.sequence_length, self.test_task.sequence_length)


def clean(config: RunConfig) -> RunConfig:
  """Returns the run under the protocol `clean`.

  Selection and early stopping use a validation set, a macro average becomes
  the accuracy per token, and a constant learning rate the cosine to 0.
  """
  training = config.training
  changes = {}
  if training.metric == 'macro':
    changes['metric'] = 'token'
  if training.schedule == 'constant':
    changes['schedule'] = 'cosine'
  return dataclasses.replace(
    config,
    protocol='clean',
    training=dataclasses.replace(training, **changes),
  )


def as_dict(config: RunConfig) -> dict[str, Any]:
  """Returns the configuration as JSON has it; options of other mixers left out.

  The tasks carry the name of their class, and of the mixers' options only those
  of the mixers that the model has.
  """
  fields = dataclasses.asdict(config)
  for name in ('task', 'test_task'):
    fields[name]['class'] = type(getattr(config, name)).__name__
  for name in mixers_lib.MIXERS:
    if name not in config.model.mixers:
      del fields['model'][name]
  return json.loads(json.dumps(fields))


def _digest(fields: dict[str, Any]) -> str:
  text = json.dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def key(config: RunConfig) -> str:
  """Returns 16 hex digits that name the run by all of its configuration."""
  return _digest(as_dict(config))


def group_key(config: RunConfig) -> str:
  """Returns the same for all runs that differ in `VARIED` alone."""
  fields = as_dict(config)
  for name in VARIED:
    del fields['training'][name]
  return _digest(fields)
