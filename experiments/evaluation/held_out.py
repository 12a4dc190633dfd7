"""Bits per byte on text that was not trained on: validation or test."""

from collections.abc import Iterable, Iterator
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deltanet_jax
from experiments import config as config_lib
from experiments.data import token_store
from experiments.training import placement as placement_lib
from experiments.training import train_step

Window = dict[str, np.ndarray]


class OverlappingWindows:
  """Windows that score every token once, with half a window before it.

  With S half of the context, window i holds the tokens [(i - 1) S, (i + 1) S]
  and scores the predictions of [i S + 1, (i + 1) S]. What lies outside of the
  split is padding (segment 0).
  """

  def __init__(self, split: token_store.Split, context_length: int):
    self._split = split
    self._stride = context_length // 2

  def __len__(self) -> int:
    return -(-(len(self._split.tokens) - 1) // self._stride)

  def __getitem__(self, index: int) -> Window:
    """Returns `tokens`, `segment_ids` int32 and `scored` bool, all [2 S + 1].

    `scored` marks the tokens whose prediction counts.
    """
    stride, size = self._stride, len(self._split.tokens)
    position = np.arange((index - 1) * stride, (index + 1) * stride + 1)
    inside = (position >= 0) & (position < size)
    position = np.clip(position, 0, size - 1)
    document = np.searchsorted(self._split.offsets, position, side='right')
    tokens = np.where(inside, self._split.tokens[position], 0)
    return {
      'tokens': tokens.astype(np.int32),
      'segment_ids': np.where(inside, document, 0).astype(np.int32),
      'scored': np.arange(2 * stride + 1) > stride,
    }


@functools.partial(jax.jit, static_argnums=0)
def _score(model_config, params, batch):
  losses, counts = train_step.token_losses(model_config, params, batch)
  counts &= batch['scored'][:, 1:]
  return jnp.sum(losses, 1, where=counts), jnp.sum(counts, 1)  # [B], [B]


def batches(windows: Iterable[Window], size: int) -> Iterator[Window]:
  """Yields windows in batches, the last one filled with zeros."""
  for rows in itertools.batched(windows, size):
    padding = jax.tree.map(np.zeros_like, rows[0])
    rows += (padding,) * (size - len(rows))
    yield jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def evaluate(
  model_config: deltanet_jax.ModelConfig,
  params: Any,
  split: token_store.Split,
  config: config_lib.EvaluationConfig,
  *,
  num_tokens: int | None = None,
  placement: placement_lib.Placement | None = None,
) -> dict[str, float]:
  """Measures a model on a split.

  Args:
    model_config: the model's configuration.
    params: its parameters.
    split: the one to measure on.
    config: `context_length` and `batch_size` are read.
    num_tokens: about how many tokens are scored, in windows spread evenly over
      the split; None: all of them.
    placement: of the batches, for parameters on several devices.

  Returns:
    `loss` in nats per token, `bits_per_byte`, and `tokens`, the number scored.
    Where not all tokens are scored, bits per byte assume the split's mean
    number of bytes per token.

  Raises:
    ValueError: the split has no token to predict.
  """
  predicted = len(split.tokens) - split.num_documents
  if not predicted:
    raise ValueError(
      f'the split {split.name!r} has no token to predict: give more documents '
      'or lower data.held_out_modulus'
    )
  windows = OverlappingWindows(split, config.context_length)
  count = len(windows)
  if num_tokens is not None:
    count = min(count, -(-num_tokens // (config.context_length // 2)))
  chosen = np.linspace(0, len(windows) - 1, count).round().astype(int)
  placement = placement or placement_lib.Placement()
  size = -(-config.batch_size // placement.rows) * placement.rows
  total, scored = 0.0, 0
  for batch in batches((windows[i] for i in chosen), size):
    losses, counts = placement.fetch(
      _score(model_config, params, placement.put(batch, size))
    )
    total += math.fsum(losses)
    scored += int(counts.sum())
  loss = total / max(scored, 1)
  return {
    'loss': loss,
    'bits_per_byte': loss / math.log(2) * predicted / split.num_bytes,
    'tokens': scored,
  }
