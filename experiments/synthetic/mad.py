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


def arrange_recall(
  keys: np.ndarray, value_of: np.ndarray, kept: np.ndarray
) -> task.Examples:
  """Returns pairs in a row, the value of a key that was there as its target.

  Args:
    keys: [N, P].
    value_of: [N, keys], the value of every key.
    kept: bool [N, P]; other pairs neither show a key nor are a target.
  """
  num_examples, pairs = keys.shape
  row = np.empty((num_examples, 2 * pairs), np.int32)
  row[:, 0::2] = keys
  row[:, 1::2] = np.take_along_axis(value_of, keys, axis=1)
  earlier = (keys[:, :, None] == keys[:, None]) & np.tri(
    pairs, k=-1, dtype=bool
  )
  scored = (earlier & kept[:, None]).any(axis=2) & kept
  targets = np.full_like(row, task.IGNORED)
  targets[:, 1::2] = np.where(scored, row[:, 1::2], task.IGNORED)
  return task.Examples(row, targets)


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
  kept = np.pad(kept, ((0, 0), (0, 1)), constant_values=True)
  return arrange_recall(keys, values, kept)


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


def put_noise(row: np.ndarray, kept: np.ndarray, noise: np.ndarray) -> None:
  """Overwrites the pairs of `row` [N, 2 P + 2] outside of `kept` [N, P].

  Args:
    row: changed in place; its last pair stays.
    kept: bool.
    noise: [N, P, 2], what the others become.
  """
  pairs = row[:, :-2].reshape(noise.shape)
  row[:, :-2] = np.where(kept[..., None], pairs, noise).reshape(len(row), -1)


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
  put_noise(row, kept, noise)
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


def arrange_copies(
  config: SelectiveCopyingConfig, tokens: np.ndarray, before: np.ndarray
) -> task.Examples:
  """Returns tokens among blanks, then the signal and room to repeat them.

  Args:
    config: sizes.
    tokens: [N, num_copied].
    before: [N, blanks], the index of the token that a blank stands before.
  """
  copied, length = config.num_copied, config.sequence_length
  signal, blank = config.vocab_size - 1, config.vocab_size - 2
  inputs = np.full((len(tokens), length), blank, np.int32)
  # Token i stands behind the i before it and the blanks put before it.
  at = np.arange(copied) + (before[:, :, None] <= np.arange(copied)).sum(axis=1)
  np.put_along_axis(inputs, at, tokens.astype(np.int32), axis=1)
  inputs[:, length - copied - 1] = signal
  targets = np.full_like(inputs, task.IGNORED)
  targets[:, -copied:] = tokens
  return task.Examples(inputs, targets)


def generate_selective_copying(
  config: SelectiveCopyingConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples; every blank comes before the last token to copy."""
  random = np.random.default_rng(seed)
  copied, blank = config.num_copied, config.vocab_size - 2
  blanks = config.sequence_length - 2 * copied - 1
  tokens = random.integers(0, blank, (num_examples, copied))
  before = np.sort(random.integers(0, copied, (num_examples, blanks)), axis=1)
  return arrange_copies(config, tokens, before)
