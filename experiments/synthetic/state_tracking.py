"""Parity: Grazzi et al., arXiv 2411.12537."""

import dataclasses

import numpy as np

from experiments.synthetic import task


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityConfig:
  """The parity of a row of bits, asked at its last bit.

  Attributes:
    min_length: fewest bits.
    max_length: most bits; shorter rows end in padding.
  """

  min_length: int = 3
  max_length: int = 40

  def __post_init__(self):
    task.require(
      1 <= self.min_length <= self.max_length,
      'min_length must be in 1 .. max_length',
      min_length=self.min_length,
      max_length=self.max_length,
    )

  @property
  def vocab_size(self) -> int:
    """Padding 0 and the bits 0, 1 as 1, 2."""
    return 3

  @property
  def sequence_length(self) -> int:
    """Tokens of a row."""
    return self.max_length


def arrange(bits: np.ndarray, lengths: np.ndarray) -> task.Examples:
  """Returns rows of the first `lengths` [N] of `bits` [N, T], 1 or 2 each."""
  lengths = lengths[:, None]
  position = np.arange(bits.shape[1])[None]
  bits = np.where(position < lengths, bits, 0)
  parity = bits.sum(axis=1, keepdims=True) % 2
  inputs = np.where(position < lengths, bits + 1, 0)
  targets = np.where(position == lengths - 1, parity + 1, task.IGNORED)
  return task.Examples(inputs.astype(np.int32), targets.astype(np.int32))


def generate(
  config: ParityConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples whose lengths are uniform."""
  random = np.random.default_rng(seed)
  lengths = random.integers(
    config.min_length, config.max_length + 1, num_examples
  )
  bits = random.integers(0, 2, (num_examples, config.max_length))
  return arrange(bits, lengths)
