"""MAD's memorization and compression: Poli et al., arXiv 2403.17844.

As in https://github.com/athms/mad-lab, 0f49a452, but for the random numbers.
"""

import dataclasses

import numpy as np

from experiments.synthetic import task

# Of the map that all examples share, whatever their own seed is.
_MAP_SEED = 12345


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorizationConfig:
  """Keys whose values, the same in all examples, the weights have to hold.

  Attributes:
    vocab_size: keys are the lower half, values the upper one, the last token
      stands where a value is asked.
    sequence_length: tokens of a row: keys and what asks for their values.
  """

  vocab_size: int = 256
  sequence_length: int = 32

  def __post_init__(self):
    task.require(
      self.vocab_size >= 3,
      'vocab_size must be at least 3',
      vocab_size=self.vocab_size,
    )
    task.require(
      self.sequence_length >= 2 and self.sequence_length % 2 == 0,
      'sequence_length must be even and at least 2',
      sequence_length=self.sequence_length,
    )


def value_table(vocab_size: int) -> np.ndarray:
  """Returns the value of every key, no value twice."""
  half = (vocab_size - 1) // 2
  values = np.arange(half, vocab_size - 1)
  return np.random.default_rng(_MAP_SEED).permutation(values)[:half]


def arrange_memorization(
  config: MemorizationConfig, keys: np.ndarray, table: np.ndarray
) -> task.Examples:
  """Returns keys [N, P], each before the token that asks for its value."""
  shape = len(keys), config.sequence_length
  inputs = np.full(shape, config.vocab_size - 1, np.int32)
  targets = np.full(shape, task.IGNORED, np.int32)
  inputs[:, 0::2] = keys
  targets[:, 1::2] = table[keys]
  return task.Examples(inputs, targets)


def generate_memorization(
  config: MemorizationConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples; the value is the target at the token that asks for it."""
  table = value_table(config.vocab_size)
  random = np.random.default_rng(seed)
  shape = num_examples, config.sequence_length // 2
  return arrange_memorization(
    config, random.integers(0, len(table), shape), table
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionConfig:
  """Tokens that are to be told from the state at the last position alone.

  The model's `BlockConfig.readout` must be `auto_encoder`.

  Attributes:
    vocab_size: its last is the token that ends a row.
    sequence_length: tokens of a row.
  """

  vocab_size: int = 16
  sequence_length: int = 32

  def __post_init__(self):
    task.require(
      self.vocab_size >= 2 and self.sequence_length >= 2,
      'vocab_size and sequence_length must be at least 2',
      vocab_size=self.vocab_size,
      sequence_length=self.sequence_length,
    )


def generate_compression(
  config: CompressionConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples whose targets are their inputs, the last included."""
  random = np.random.default_rng(seed)
  last = config.vocab_size - 1
  shape = num_examples, config.sequence_length
  inputs = random.integers(0, last, shape).astype(np.int32)
  inputs[:, -1] = last
  return task.Examples(inputs, inputs.copy())
