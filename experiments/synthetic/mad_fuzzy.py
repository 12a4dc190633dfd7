"""MAD's fuzzy recall: keys and values of one to three tokens each.

Poli et al., arXiv 2403.17844, as in https://github.com/athms/mad-lab,
0f49a452, but for the random numbers.
"""

import dataclasses

import numpy as np

from experiments.synthetic import task

MOTIF = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuzzyRecallConfig:
  """Pairs of motifs, up to `MOTIF` different tokens each; the last is asked.

  Attributes:
    vocab_size: keys are of the lower half, values of the upper one, the last
      token is the padding on the left.
    sequence_length: tokens of a row.
    scores_all: training: every next token is a target, the padding too, and
      keys have any size; otherwise the values of keys that were there before,
      and keys have `MOTIF` tokens.
  """

  vocab_size: int = 16
  sequence_length: int = 128
  scores_all: bool = False

  def __post_init__(self):
    task.require(
      (self.vocab_size - 1) // 2 >= MOTIF,
      f'vocab_size must be at least {2 * MOTIF + 1}',
      vocab_size=self.vocab_size,
    )
    task.require(
      self.sequence_length >= 6 * MOTIF,
      f'sequence_length must be at least {6 * MOTIF}',
      sequence_length=self.sequence_length,
    )


def _motifs(random, tokens: np.ndarray, sizes: np.ndarray) -> list[tuple]:
  """Returns a tuple of different tokens for every size."""
  order = np.argsort(random.random((len(sizes), len(tokens))), axis=1)
  motifs = tokens[order[:, :MOTIF]].tolist()
  return [tuple(m[:size]) for m, size in zip(motifs, sizes, strict=True)]


def arrange(
  keys: list[tuple], values: list[tuple], probe_at: int, limit: int
) -> tuple[list[int], list[int]]:
  """Returns a row and its targets: pairs up to `limit`, the first pair last.

  The first pair of the lists is the probe: it comes as soon as `probe_at`
  tokens are there, and again at the end. A key that comes again has the value
  that it had.
  """
  row, targets = [], []
  value_of, presented, placed = {keys[0]: values[0]}, set(), False

  def emit(key):
    value = value_of[key]
    row.extend(key + value)
    hidden = (task.IGNORED,) * len(value)
    targets.extend((task.IGNORED,) * len(key))
    targets.extend(value if key in presented else hidden)
    presented.add(key)

  others = iter(zip(keys[1:], values[1:], strict=True))
  while len(row) < limit:
    if len(row) >= probe_at and not placed:
      emit(keys[0])
      placed = True
      continue
    key, value = next(others)
    value_of.setdefault(key, value)
    emit(key)
  emit(keys[0])
  return row, targets


def _example(random, config) -> tuple[list[int], list[int]]:
  length, n = config.sequence_length, config.vocab_size - 1
  most = length // 2 + 1
  least = 1 if config.scores_all else MOTIF
  keys = _motifs(
    random, np.arange(n // 2), random.integers(least, MOTIF + 1, most)
  )
  values = _motifs(
    random, np.arange(n // 2, n), random.integers(1, MOTIF + 1, most)
  )
  size = len(keys[0] + values[0])
  limit = length - size - 2 * MOTIF
  # The cap is ours: beyond it a row might end before the probe came.
  probe_at = min(int(random.integers(0, length - 2 * size)), limit - 2 * MOTIF)
  return arrange(keys, values, probe_at, limit)


def generate(
  config: FuzzyRecallConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples, padded on the left; the last key was there before."""
  random = np.random.default_rng(seed)
  shape = num_examples, config.sequence_length + 1
  rows = np.full(shape, config.vocab_size - 1, np.int32)
  targets = np.full(shape, task.IGNORED, np.int32)
  for i in range(num_examples):
    row, target = _example(random, config)
    rows[i, -len(row) :] = row
    targets[i, -len(row) :] = target
  after = rows if config.scores_all else targets
  return task.Examples(rows[:, :-1], after[:, 1:])
