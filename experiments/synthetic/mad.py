"""Recall and selective copying of MAD: Poli et al., arXiv 2403.17844.

As in https://github.com/athms/mad-lab, 0f49a452, but for the random numbers.
"""

import dataclasses

import numpy as np

from experiments.synthetic import task


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig:
  """In-context recall: pairs of keys and values, of which some come again.

  Attributes:
    vocab_size: keys are the lower half, values the upper one.
    length: tokens; a row is one shorter, as its last is only predicted.
    scores_all: every next token is a target, as in training; otherwise only
      the values of keys that were there before.
  """

  vocab_size: int = 16
  length: int = 128
  scores_all: bool = False

  def __post_init__(self):
    task.require(
      self.vocab_size >= 4, 'vocab_size must be at least 4', got=self.vocab_size
    )
    task.require(
      self.length >= 4 and self.length % 2 == 0,
      'length must be even and at least 4',
      length=self.length,
    )

  @property
  def sequence_length(self) -> int:
    """Tokens of a row."""
    return self.length - 1


def _recall_examples(random, config, kept, vocab_size) -> task.Examples:
  """Returns recall whose pairs outside of `kept` [N, P - 1] are not counted.

  Their tokens are to be replaced; the last pair's key is one of the kept.
  """
  half, pairs = vocab_size // 2, config.length // 2
  num_examples = len(kept)
  keys = random.integers(0, half, (num_examples, pairs))
  # A key that was there: the one of an earlier pair, uniform over the keys.
  ranks = random.random((num_examples, half))
  rows = np.nonzero(kept)[0]
  seen = np.zeros((num_examples, half), bool)
  seen[rows, keys[:, :-1][kept]] = True
  keys[:, -1] = np.argmax(np.where(seen, ranks, -1), axis=1)
  values = random.integers(half, vocab_size, (num_examples, half))
  row = np.empty((num_examples, config.length), np.int32)
  row[:, 0::2] = keys
  row[:, 1::2] = np.take_along_axis(values, keys, axis=1)
  kept = np.pad(kept, ((0, 0), (0, 1)), constant_values=True)
  earlier = (keys[:, :, None] == keys[:, None]) & np.tri(
    pairs, k=-1, dtype=bool
  )
  scored = (earlier & kept[:, None]).any(axis=2) & kept
  targets = np.full_like(row, task.IGNORED)
  targets[:, 1::2] = np.where(scored, row[:, 1::2], task.IGNORED)
  return task.Examples(row, targets)


def _shift(config, row, targets) -> task.Examples:
  """Returns inputs with the next token, or its target, at every position."""
  after = row if config.scores_all else targets
  return task.Examples(row[:, :-1], after[:, 1:])


def generate_recall(
  config: RecallConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples; the last key was there before."""
  kept = np.ones((num_examples, config.length // 2 - 1), bool)
  random = np.random.default_rng(seed)
  row, targets, _ = _recall_examples(random, config, kept, config.vocab_size)
  return _shift(config, row, targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyRecallConfig(RecallConfig):
  """In-context recall in which some pairs are two tokens of noise.

  Attributes:
    vocab_size: keys, values and, above them, the tokens of noise.
    num_noise: tokens of noise.
    noise_fraction: how many pairs are noise; one pair of a row never is, nor
      the last.
  """

  vocab_size: int = 32
  num_noise: int = 16
  noise_fraction: float = 0.2

  def __post_init__(self):
    super().__post_init__()
    task.require(
      self.num_noise >= 1 and self.vocab_size >= self.num_noise + 4,
      'num_noise must be at least 1, vocab_size at least num_noise + 4',
      num_noise=self.num_noise,
      vocab_size=self.vocab_size,
    )
    task.require(
      0 <= self.noise_fraction <= 1,
      'noise_fraction must be in 0 .. 1',
      noise_fraction=self.noise_fraction,
    )


def generate_noisy_recall(
  config: NoisyRecallConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples; noise is never a target but where all tokens are.

  The pair that is no noise is drawn among those before the last, where the
  authors' may be the last itself: then a row without any key can not come up.
  """
  random = np.random.default_rng(seed)
  shape = num_examples, config.length // 2 - 1
  kept = random.random(shape) >= config.noise_fraction
  kept[np.arange(num_examples), random.integers(0, shape[1], num_examples)] = (
    True
  )
  first = config.vocab_size - config.num_noise
  row, targets, _ = _recall_examples(random, config, kept, first)
  noise = random.integers(first, config.vocab_size, (*shape, 2))
  is_noise = np.repeat(~kept, 2, axis=1)
  row[:, :-2] = np.where(is_noise, noise.reshape(num_examples, -1), row[:, :-2])
  return _shift(config, row, targets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopyingConfig:
  """Selective copying: tokens among blanks are to be repeated at the end.

  Attributes:
    vocab_size: its last two are the blank and the signal to copy.
    sequence_length: tokens of a row.
    num_copied: tokens to copy.
  """

  vocab_size: int = 16
  sequence_length: int = 256
  num_copied: int = 16

  def __post_init__(self):
    task.require(
      self.vocab_size >= 3, 'vocab_size must be at least 3', got=self.vocab_size
    )
    task.require(
      self.num_copied >= 1 and self.sequence_length > 2 * self.num_copied,
      'sequence_length must be above 2 num_copied, num_copied at least 1',
      sequence_length=self.sequence_length,
      num_copied=self.num_copied,
    )


def generate_selective_copying(
  config: SelectiveCopyingConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples; every blank comes before the last token to copy."""
  random = np.random.default_rng(seed)
  copied, length = config.num_copied, config.sequence_length
  signal, blank = config.vocab_size - 1, config.vocab_size - 2
  blanks = length - 2 * copied - 1
  tokens = random.integers(0, blank, (num_examples, copied))
  before = np.sort(random.integers(0, copied, (num_examples, blanks)), axis=1)
  inputs = np.full((num_examples, length), blank, np.int32)
  # Token i stands behind the i before it and the blanks put before it.
  at = np.arange(copied) + (before[:, :, None] <= np.arange(copied)).sum(axis=1)
  np.put_along_axis(inputs, at, tokens.astype(np.int32), axis=1)
  inputs[:, blanks + copied] = signal
  targets = np.full_like(inputs, task.IGNORED)
  targets[:, -copied:] = tokens
  return task.Examples(inputs, targets)
