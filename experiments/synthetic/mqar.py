"""Multi-query associative recall: Arora et al., arXiv 2312.04927.

As in https://github.com/HazyResearch/zoology, d88d6f54, but for the random
numbers, which are of a generator of their own.
"""

import dataclasses

import numpy as np

from experiments.synthetic import task

_POWER = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQARConfig:
  """A row is k1 v1 k2 v2 ..., then every key once, where its value is asked.

  Attributes:
    vocab_size: keys are 1 .. vocab_size/2 - 1, values the upper half, 0 fills.
    sequence_length: tokens of a row, even.
    num_pairs: keys with their values.
  """

  vocab_size: int = 8192
  sequence_length: int = 64
  num_pairs: int = 8

  def __post_init__(self):
    length, pairs, size = (
      self.sequence_length,
      self.num_pairs,
      self.vocab_size,
    )
    task.require(pairs >= 1, 'num_pairs must be at least 1', num_pairs=pairs)
    task.require(
      length % 2 == 0 and 4 * pairs <= length,
      'sequence_length must be even and at least 4 num_pairs',
      sequence_length=length,
      num_pairs=pairs,
    )
    task.require(
      size > length and size // 2 - 1 >= pairs,
      'vocab_size must be above sequence_length and hold 2 num_pairs + 2',
      vocab_size=size,
      sequence_length=length,
      num_pairs=pairs,
    )


def _distinct(random, weights, num_examples, count) -> np.ndarray:
  """Draws `count` distinct indices per example, one after the other.

  The order of u_i^(1/w_i), u uniform, is that of draws without replacement with
  probabilities in proportion to w (Efraimidis and Spirakis, 2006).
  """
  draws = random.random((num_examples, len(weights)))
  order = np.argsort(np.log(draws) / weights, axis=1)
  return order[:, : -count - 1 : -1]


def arrange(
  config: MQARConfig, keys: np.ndarray, values: np.ndarray, gaps: np.ndarray
) -> task.Examples:
  """Returns the rows of keys, values and gaps, each [N, P]."""
  pairs = config.num_pairs
  shape = len(keys), config.sequence_length
  inputs = np.zeros(shape, np.int32)
  targets = np.full(shape, task.IGNORED, np.int32)
  inputs[:, 0 : 2 * pairs : 2] = keys
  inputs[:, 1 : 2 * pairs : 2] = values
  rows, at = np.arange(len(keys))[:, None], 2 * pairs + 2 * gaps
  inputs[rows, at] = keys
  targets[rows, at] = values
  return task.Examples(inputs, targets)


def generate(
  config: MQARConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples; the query at 2 P + 2 gap has its value as the target.

  Gaps are drawn without replacement, gap i with weight i^(0.01 - 1).
  """
  random = np.random.default_rng(seed)
  pairs, half = config.num_pairs, config.vocab_size // 2
  keys = 1 + _distinct(random, np.ones(half - 1), num_examples, pairs)
  values = half + _distinct(
    random, np.ones(config.vocab_size - half), num_examples, pairs
  )
  space = (config.sequence_length - 2 * pairs) // 2
  weights = np.arange(1, space + 1) ** (_POWER - 1)
  gaps = _distinct(random, weights, num_examples, pairs)
  return arrange(config, keys, values, gaps)
