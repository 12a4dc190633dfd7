"""Loss by position: by how many tokens of the document are before a token."""

from collections.abc import Iterable, Iterator
import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

import deltanet_jax
from experiments.data import token_store
from experiments.evaluation import held_out
from experiments.training import train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
  """How far positions go beyond the training length, and how many are read.

  Attributes:
    training_length: tokens L of a training window, even.
    times: the greatest position is this many times L.
    max_scored: most tokens scored of a document, as a multiple of L.
  """

  training_length: int
  times: int
  max_scored: int

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value < 1:
        raise ValueError(f'{field.name} must be at least 1, got {value}')
    if self.training_length % 2:
      raise ValueError(
        f'training_length must be even, got {self.training_length}'
      )

  @property
  def length(self) -> int:
    """The greatest position."""
    return self.training_length * self.times

  @property
  def num_buckets(self) -> int:
    """Buckets of positions, from 1 to the greatest."""
    return 2 * self.times

  @property
  def stretch(self) -> int:
    """Half the training length: the size of a bucket of positions."""
    return self.training_length // 2


class ContextWindows:
  """Windows that score the same tokens at near and at far positions.

  The position of a token is the number of tokens before it in the window, all
  of its own document. A document, BOS before it, is cut into stretches of L / 2
  tokens, L and N `times` as `Reach` says; the whole ones after the first
  2 N - 1 are scored, at most `max_scored` L tokens. Windows of N L + 1 tokens
  start at every stretch, so that each scored token is read 2 N times, once in
  every bucket of L / 2 positions: all buckets hold the very same tokens, and
  only how much of the document comes before them differs.
  """

  def __init__(self, split: token_store.Split, reach: Reach):
    self._unscored = reach.num_buckets - 1
    sizes = np.diff(split.offsets) - 1
    most = self._unscored + 2 * reach.max_scored
    stretches = np.minimum(sizes // reach.stretch, most)  # [documents]
    long_enough = np.flatnonzero(stretches > self._unscored)
    if not long_enough.size:
      raise ValueError(
        f'no document of the split {split.name!r} has {reach.length} tokens, '
        f'{reach.times} times the training length {reach.training_length}: '
        'give longer documents or train on shorter windows'
      )
    self._split = split
    self._reach = reach
    self._starts = split.offsets[long_enough]
    self._stretches = stretches[long_enough]
    self._index = [
      (document, first)
      for document, count in enumerate(self._stretches)
      for first in range(count)
    ]

  @property
  def num_documents(self) -> int:
    """Documents that are long enough."""
    return len(self._starts)

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, index: int) -> held_out.Window:
    """Returns `document` int, `tokens` int32 and `scored` bool, [N L + 1] each.

    `document` counts those that are long enough from 0. `scored` marks the
    tokens whose prediction counts; tokens past the last of them are 0.
    """
    stretch = self._reach.stretch
    document, first = self._index[index]
    count = self._stretches[document]
    position = np.arange(self._reach.length + 1)
    begin = self._starts[document] + first * stretch
    end = self._starts[document] + count * stretch + 1
    read = self._split.tokens[begin : min(begin + len(position), end)]
    number = first + (position - 1) // stretch  # Of a token's stretch.
    wanted = (number >= self._unscored) & (number < count)
    return {
      'document': np.asarray(document),
      'tokens': np.pad(read.astype(np.int32), (0, len(position) - len(read))),
      'scored': wanted & (position > 0),
    }

  def __iter__(self) -> Iterator[held_out.Window]:
    return (self[index] for index in range(len(self)))


@functools.partial(jax.jit, static_argnums=0)
def _losses(model_config, params, tokens):
  """Returns the losses of all tokens but the first, [B, N L]."""
  return train_step.token_losses(model_config, params, {'tokens': tokens})[0]


def _sum_by_document(
  windows: ContextWindows, reach: Reach, batches: Iterable
) -> tuple[np.ndarray, np.ndarray]:
  """Returns summed losses, numbers of tokens, both [documents, buckets]."""
  sums = np.zeros((windows.num_documents, reach.num_buckets))
  counts = np.zeros(sums.shape, np.int64)
  for batch, losses in batches:
    scored = batch['scored'][:, 1:]
    for totals, values in (
      (sums, np.where(scored, losses, 0).astype(np.float64)),
      (counts, scored.astype(np.int64)),
    ):
      buckets = values.reshape(-1, reach.num_buckets, reach.stretch)
      np.add.at(totals, batch['document'], buckets.sum(-1))
  return sums, counts


def _standard_error(influence: np.ndarray) -> float | None:
  """Returns the error of a sum over documents; None of a single one."""
  count = len(influence)
  if count == 1:
    return None
  return math.sqrt(count / (count - 1) * np.sum(influence**2))


def summarize(
  sums: np.ndarray, counts: np.ndarray, reach: Reach
) -> list[dict[str, Any]]:
  """Returns a row per bucket of positions, from sums per document.

  With s_d the summed loss of document d in a bucket and c_d its tokens there,
  `loss` is m = sum_d s_d / sum_d c_d in nats per token. Tokens of a document
  are not independent, documents are taken to be: of n documents,

      standard_error = sqrt(n / (n - 1) sum_d u_d^2)
      u_d = (s_d - m c_d) / sum_d c_d

  `change` is the loss less that of the last bucket within the training length,
  and its error that of the difference of the two u_d: the documents are the
  same. Errors of a single document are None.

  Args:
    sums: losses.  # [documents, buckets]
    counts: tokens; every bucket has some.  # [documents, buckets]
    reach: what the buckets are.
  """
  totals = counts.sum(0)  # [buckets]
  means = sums.sum(0) / totals
  influence = (sums - means * counts) / totals  # [documents, buckets]
  base = 1  # Its last position is the training length.
  return [
    {
      'first': i * reach.stretch + 1,
      'last': (i + 1) * reach.stretch,
      'tokens': int(totals[i]),
      'documents': len(sums),
      'loss': float(means[i]),
      'standard_error': _standard_error(influence[:, i]),
      'change': float(means[i] - means[base]),
      'change_standard_error': _standard_error(
        influence[:, i] - influence[:, base]
      ),
    }
    for i in range(len(means))
  ]


def evaluate(
  model_config: deltanet_jax.ModelConfig,
  params: Any,
  split: token_store.Split,
  reach: Reach,
  *,
  batch_size: int,
) -> list[dict[str, Any]]:
  """Measures a model on the long documents of a split, by position.

  Args:
    model_config: the model's configuration.
    params: its parameters.
    split: the one to measure on.
    reach: the positions.
    batch_size: windows of `reach.length` tokens evaluated at once.

  Returns:
    A row per bucket of positions, see `summarize`.

  Raises:
    ValueError: no document is long enough.
  """
  windows = ContextWindows(split, reach)

  def scored_batches():
    for batch in held_out.batches(windows, batch_size):
      tokens = jax.device_put(batch['tokens'])
      yield batch, jax.device_get(_losses(model_config, params, tokens))

  sums, counts = _sum_by_document(windows, reach, scored_batches())
  return summarize(sums, counts, reach)
