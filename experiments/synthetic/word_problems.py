"""Word problems of groups: Siems et al., arXiv 2502.10297."""

import dataclasses
import itertools
import re

import numpy as np

from experiments.synthetic import task

GROUPS = ('S3', 'S4', 'A5', 'S5')


def _is_cyclic(group: str) -> bool:
  return bool(re.fullmatch(r'Z([2-9]|[1-9][0-9]+)', group))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordProblemConfig:
  """Uniform elements of a group; the target is their product up to there.

  Attributes:
    group: one of `GROUPS`, or Zn: the cyclic one of n elements.
    length: elements of a row; a token that begins it comes before them.
  """

  group: str = 'S3'
  length: int = 128

  def __post_init__(self):
    task.require(
      self.group in GROUPS or _is_cyclic(self.group),
      f'group must be one of {", ".join(GROUPS)} or Zn with n of at least 2',
      group=self.group,
    )
    task.require(
      self.length >= 1, 'length must be at least 1', length=self.length
    )

  @property
  def vocab_size(self) -> int:
    """The elements and the token that begins a row."""
    return len(elements(self.group)) + 1

  @property
  def sequence_length(self) -> int:
    """Tokens of a row."""
    return self.length + 1


def elements(group: str) -> np.ndarray:
  """Returns the permutations [G, n] of a group, the identity first."""
  size = int(group[1:])
  if group.startswith('Z'):
    return (np.arange(size)[:, None] + np.arange(size)) % size
  found = np.array(list(itertools.permutations(range(size))))
  if group.startswith('S'):
    return found
  inversions = sum(
    (found[:, i] > found[:, j]).astype(int)
    for i, j in itertools.combinations(range(size), 2)
  )
  return found[inversions % 2 == 0]


def product_table(group: str) -> np.ndarray:
  """Returns [G, G]: the index of x y, (x y)(i) = x(y(i))."""
  found = elements(group)
  if group.startswith('Z'):
    # The rotation by i after the one by j: what i does to j.
    return found
  products = found[:, found]  # [G, G, n]
  powers = len(found[0]) ** np.arange(len(found[0]))
  index = np.full(int((found @ powers).max()) + 1, -1)
  index[found @ powers] = np.arange(len(found))
  return index[products @ powers]


def arrange(table: np.ndarray, words: np.ndarray) -> task.Examples:
  """Returns rows of the words [N, T] with the products up to every one."""
  product = np.zeros(len(words), int)
  targets = np.full((len(words), words.shape[1] + 1), task.IGNORED, np.int32)
  for t, word in enumerate(words.T, start=1):
    product = table[product, word]
    targets[:, t] = product
  begin = np.full((len(words), 1), len(table))
  inputs = np.concatenate([begin, words], axis=1).astype(np.int32)
  return task.Examples(inputs, targets)


def generate(
  config: WordProblemConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples; the first token begins the row and is not scored."""
  table = product_table(config.group)
  random = np.random.default_rng(seed)
  words = random.integers(0, len(table), (num_examples, config.length))
  return arrange(table, words)
