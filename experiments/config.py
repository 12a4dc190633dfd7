"""The frozen configuration of a training run: one dataclass per concern."""

import dataclasses
import typing
from typing import Any

from deltanet_jax import config as model_config
from experiments import compilation_cache as compilation_cache_lib


def _require(rule: bool, message: str) -> None:
  if not rule:
    raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What is read, how it is tokenised and how it is cut into windows.

  Attributes:
    store: directory of a token store written by `experiments.tokenize_text`;
      empty: a store is built from `files` inside the run's directory.
    files: glob patterns of text, .jsonl, .jsonl.gz or .parquet files; empty:
      the default corpus (`experiments.data.corpus`).
    text_field: name of the text field of .jsonl and .parquet rows.
    tokenizer: `byte`, or the path of a Hugging Face `tokenizer.json`.
    sequence_length: tokens a training window predicts.
    batch_size: windows per optimizer step, all micro-batches together.
    held_out_modulus: a document is for validation when the hash of its path
      (of its path and line for rows) is 0 modulo this, and for the test, held
      out, when it is 1.
    max_bad_fraction: share of unreadable documents above which reading stops.
    shuffle_seed: seed of the global order of the windows.
  """

  store: str = ''
  files: tuple[str, ...] = ()
  text_field: str = 'text'
  tokenizer: str = 'byte'
  sequence_length: int = 1024
  batch_size: int = 8
  held_out_modulus: int = 50
  max_bad_fraction: float = 0.001
  shuffle_seed: int = 0

  def __post_init__(self):
    for name in ('sequence_length', 'batch_size', 'held_out_modulus'):
      value = getattr(self, name)
      _require(value >= 1, f'data.{name} must be at least 1, got {value}')
    _require(
      0 <= self.max_bad_fraction <= 1,
      f'data.max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}',
    )
    _require(
      not (self.store and self.files),
      'data.store and data.files exclude each other: a store already holds '
      f'its files; got store={self.store!r} and files={self.files!r}',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with linear warm-up and cosine decay.

  The learning rate rises linearly from `initial_learning_rate` to
  `peak_learning_rate` over `warmup_steps` and falls along a cosine to
  `final_learning_rate` at the end of the run.

  Attributes:
    peak_learning_rate: the greatest learning rate, without a unit like all
      three: Adam's update of a parameter, about 1 in size, is multiplied by it.
    initial_learning_rate: the learning rate of the first step.
    final_learning_rate: the learning rate at the end of the run.
    warmup_steps: optimizer steps of the rise, fewer than those of the run.
    b1: share of the mean gradient that is kept from step to step.
    b2: share of the mean squared gradient that is kept from step to step.
    eps: added to the root of the mean squared gradient, and in its unit.
    weight_decay: times the learning rate, the share of a parameter that a step
      takes off it; scales, biases, decay rates and other vectors are spared.
    clip_norm: greatest norm, over all parameters, of the gradient of the mean
      loss in nats per token; a greater one is scaled down to it.
  """

  peak_learning_rate: float = 3e-4
  initial_learning_rate: float = 3e-5
  final_learning_rate: float = 3e-5
  warmup_steps: int = 1000
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: float = 1.0

  def __post_init__(self):
    for name in ('peak_learning_rate', 'eps', 'clip_norm'):
      value = getattr(self, name)
      _require(value > 0, f'optimizer.{name} must be above 0, got {value}')
    for name in (
      'initial_learning_rate',
      'final_learning_rate',
      'warmup_steps',
      'weight_decay',
    ):
      value = getattr(self, name)
      _require(value >= 0, f'optimizer.{name} must be at least 0, got {value}')
    for name in ('b1', 'b2'):
      value = getattr(self, name)
      _require(
        0 <= value < 1, f'optimizer.{name} must lie in [0, 1), got {value}'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """The loop itself.

  Attributes:
    num_steps: optimizer steps.
    gradient_accumulation_steps: micro-batches per step, weighted by tokens.
    seed: seed of the parameters.
    log_every_steps: distance of the logged lines.
    spike_sigmas: a step whose loss, or logarithm of the gradient norm, lies
      this many standard deviations above the mean of the last `spike_window` is
      not applied.
    spike_window: number of past steps the mean and deviation are taken over.
    max_bad_steps: refused steps in a row that stop the run.
  """

  num_steps: int = 1000
  gradient_accumulation_steps: int = 1
  seed: int = 0
  log_every_steps: int = 10
  spike_sigmas: float = 6.0
  spike_window: int = 128
  max_bad_steps: int = 10

  def __post_init__(self):
    for name in (
      'num_steps',
      'gradient_accumulation_steps',
      'log_every_steps',
      'spike_window',
      'max_bad_steps',
    ):
      value = getattr(self, name)
      _require(value >= 1, f'training.{name} must be at least 1, got {value}')
    _require(
      self.spike_sigmas > 0,
      f'training.spike_sigmas must be above 0, got {self.spike_sigmas}',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Evaluation on the validation split in the loop, on the test split after it.

  Attributes:
    every_steps: distance of the evaluations in the loop.
    num_tokens: tokens scored by an evaluation in the loop (the last one of a
      run, and that of the test, score all).
    context_length: tokens the model sees at once; windows overlap by half and
      only the newer half of each is scored, so every token has at least half
      a window before it.
    batch_size: windows evaluated at once.
  """

  every_steps: int = 500
  num_tokens: int = 65_536
  context_length: int = 2048
  batch_size: int = 8

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      _require(
        value >= 1, f'evaluation.{field.name} must be at least 1, got {value}'
      )
    _require(
      self.context_length % 2 == 0,
      f'evaluation.context_length must be even, got {self.context_length}',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """When a checkpoint is written and which are kept.

  Attributes:
    every_steps: distance of the checkpoints.
    keep_latest: how many of the newest are kept.
    keep_every_steps: checkpoints at multiples of this are kept for good; 0:
      none.
    max_failed_saves: failed saves in a row that end the run with an error.
  """

  every_steps: int = 500
  keep_latest: int = 3
  keep_every_steps: int = 0
  max_failed_saves: int = 5

  def __post_init__(self):
    for name in ('every_steps', 'max_failed_saves'):
      value = getattr(self, name)
      _require(value >= 1, f'checkpoint.{name} must be at least 1, got {value}')
    _require(
      self.keep_latest >= 2,
      'checkpoint.keep_latest must be at least 2 (a damaged newest one needs '
      f'one to fall back to), got {self.keep_latest}',
    )
    _require(
      self.keep_every_steps >= 0,
      'checkpoint.keep_every_steps must be at least 0, got '
      f'{self.keep_every_steps}',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How the devices share the work; the axes are those of `deltanet_jax`.

  Attributes:
    data: copies of the model, each with its own rows of the batch; 0: as many
      as the other axes leave devices for and the rows divide evenly.
    fsdp: devices that share the rows, and parameters and optimizer.
    tensor: devices that share heads, MLP channels and the vocabulary.
    sequence: devices that share the tokens of every row, and parameters and
      optimizer.
    dcn_data: copies on slices (or hosts) that only a slow network joins, over
      and above `data`.
  """

  data: int = 0
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1
  dcn_data: int = 1

  def __post_init__(self):
    _require(self.data >= 0, f'mesh.data must be at least 0, got {self.data}')
    for name in ('fsdp', 'tensor', 'sequence', 'dcn_data'):
      value = getattr(self, name)
      _require(value >= 1, f'mesh.{name} must be at least 1, got {value}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainLMConfig:
  """A language-model training run, whole.

  Attributes:
    model: the network; `vocab_size` at least that of the tokenizer.
    data: what is read, and the shape of a batch.
    optimizer: the rule of an update.
    training: length of the run and handling of bad steps.
    evaluation: when and how the model is measured.
    checkpoint: when the state is saved, and what is kept.
    mesh: how the devices share the work.
  """

  model: model_config.ModelConfig
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  training: TrainingConfig = TrainingConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    accumulation = self.training.gradient_accumulation_steps
    _require(
      self.data.batch_size % accumulation == 0,
      'data.batch_size must be a multiple of '
      f'training.gradient_accumulation_steps, got {self.data.batch_size} and '
      f'{accumulation}',
    )
    for name, size, axis in (
      ('model.num_heads', self.model.num_heads, 'tensor'),
      ('data.sequence_length', self.data.sequence_length, 'sequence'),
    ):
      count = getattr(self.mesh, axis)
      _require(
        size % count == 0,
        f'{name} must be a multiple of mesh.{axis}, got {size} and {count}',
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
  """The processes that a run has this time; no part of what the run is.

  Attributes:
    coordinator_address: host and port of process 0; empty: found out (SLURM,
      Kubernetes, Cloud TPU, Open MPI).
    num_processes: processes of the run; 0: found out, else one; 1: joins none.
    process_id: number of this process, from 0; -1: found out.
    peer_timeout_seconds: how long a process waits for another to start, to
      answer or to show life, before it gives up.
    watchdog_seconds: a step that takes longer ends the process, with the stacks
      of its threads in a file; the first may take three times as long; 0: none.
    compilation_cache: directory that keeps compiled programs; empty: none are
      kept.
  """

  coordinator_address: str = ''
  num_processes: int = 0
  process_id: int = -1
  peer_timeout_seconds: int = 300
  watchdog_seconds: float = 600.0
  compilation_cache: str = compilation_cache_lib.default_directory()

  def __post_init__(self):
    for name, least in (
      ('num_processes', 0),
      ('process_id', -1),
      ('peer_timeout_seconds', 1),
      ('watchdog_seconds', 0),
    ):
      value = getattr(self, name)
      _require(value >= least, f'{name} must be at least {least}, got {value}')
    _require(
      not self.num_processes or self.process_id < self.num_processes,
      f'process_id must be below num_processes, got {self.process_id} and '
      f'{self.num_processes}',
    )


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a config as nested dicts of JSON values (tuples become lists)."""

  def plain(value):
    if dataclasses.is_dataclass(value):
      return {
        f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
      }
    if isinstance(value, tuple):
      return [plain(v) for v in value]
    return value

  return plain(config)


def _parse(annotation: Any, value: Any, path: str) -> Any:
  """Returns a JSON value as the annotated type."""
  if dataclasses.is_dataclass(annotation):
    return from_dict(annotation, value, path=path)
  origin = typing.get_origin(annotation)
  if origin is tuple:
    is_valid = isinstance(value, list) and all(
      isinstance(item, str) for item in value
    )
    value = tuple(value) if is_valid else value
  elif origin is typing.Literal:
    is_valid = value in typing.get_args(annotation)
  elif annotation is float:
    is_valid = type(value) in (int, float)
  else:
    is_valid = type(value) is annotation
  _require(is_valid, f'{path} must be a {annotation}, got {value!r}')
  return value


def from_dict[Config](
  config_class: type[Config], values: Any, *, path: str = 'config'
) -> Config:
  """Returns the config that `to_dict` made nested dicts of.

  Args:
    config_class: a config's dataclass.
    values: what `to_dict` returned, maybe after a round trip through JSON.
    path: what messages call the outermost dict.

  Raises:
    ValueError: a field is missing or unknown, or a value is of another type or
      breaks a rule of its dataclass; names the field.
  """
  _require(
    isinstance(values, dict), f'{path} must be an object, got {values!r}'
  )
  annotations = typing.get_type_hints(config_class)
  for name in annotations.keys() ^ values.keys():
    problem = 'missing' if name in annotations else 'no known field'
    raise ValueError(f'{path}.{name}: {problem}')
  return config_class(
    **{
      name: _parse(annotation, values[name], f'{path}.{name}')
      for name, annotation in annotations.items()
    }
  )
