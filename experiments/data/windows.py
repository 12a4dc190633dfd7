"""Windows of a split by index, and the order in which training reads them."""

from typing import Any

import grain
import numpy as np

from experiments import config
from experiments.data import token_store

Window = dict[str, np.ndarray]

# Windows of a run. An infinite repeat() has length sys.maxsize, which a batch
# of one window rounds up, as a float, past what len() may return.
_ENDLESS = 1 << 52


class WindowSource:
  """Random access to the windows of a split.

  Window i holds the tokens [i L, i L + L + 1) for sequence length L: L
  predicted tokens and one before them, so that neighbours share a token and
  each token but the first is predicted once. The last window is padded with
  token 0 in segment 0. Segments count the documents of a window from 1.
  """

  def __init__(self, split: token_store.Split, sequence_length: int):
    if sequence_length < 1:
      raise ValueError(
        f'sequence_length must be at least 1, got {sequence_length}'
      )
    if len(split.tokens) < 2:
      raise ValueError(
        f'the split {split.name!r} has {len(split.tokens)} tokens, and a '
        'window needs 2: give more documents or change held_out_modulus'
      )
    self._split = split
    self._length = sequence_length

  def __len__(self) -> int:
    return -(-(len(self._split.tokens) - 1) // self._length)

  def __repr__(self) -> str:
    return f'WindowSource({self._split.name!r}, {self._length})'

  def __getitem__(self, index: int) -> Window:
    """Returns `tokens` and `segment_ids`, int32.  # [L + 1] each."""
    if not 0 <= index < len(self):
      raise IndexError(f'window {index} of {len(self)}')
    start = int(index) * self._length
    size = self._length + 1
    read = self._split.tokens[start : start + size]
    tokens = np.zeros(size, np.int32)
    tokens[: len(read)] = read
    offsets = self._split.offsets
    first, last = np.searchsorted(offsets, [start + 1, start + len(read)])
    segment_ids = np.zeros(size, np.int32)
    segment_ids[0] = 1
    segment_ids[offsets[first:last] - start] = 1
    np.cumsum(segment_ids, out=segment_ids)
    segment_ids[len(read) :] = 0
    return {'tokens': tokens, 'segment_ids': segment_ids}


def training_iterator(
  split: token_store.Split,
  data_config: config.DataConfig,
  *,
  start_step: int = 0,
  shard_index: int = 0,
  shard_count: int = 1,
) -> grain.DatasetIterator[dict[str, Any]]:
  """Returns an endless iterator over training batches.

  Each epoch reads every window once, in a new order. The batch of a step is a
  function of the split, the config and the step alone: the position of the
  data is the step. The shards of a batch are its rows in contiguous blocks.

  Args:
    split: where the windows come from.
    data_config: sequence_length, batch_size and shuffle_seed are read.
    start_step: step of the first batch.
    shard_index: which share of each batch this process reads.
    shard_count: how many such shares there are.

  Returns:
    An iterator over {'tokens': int32, 'segment_ids': int32}, both
    [batch_size / shard_count, sequence_length + 1].
  """
  if start_step < 0:
    raise ValueError(f'start_step must be at least 0, got {start_step}')
  if not 0 <= shard_index < shard_count:
    raise ValueError(
      f'shard_index must lie in [0, {shard_count}), got {shard_index}'
    )
  rows, rest = divmod(data_config.batch_size, shard_count)
  if rest:
    raise ValueError(
      f'data.batch_size must be a multiple of the {shard_count} shards, got '
      f'{data_config.batch_size}'
    )
  windows = grain.MapDataset.source(
    WindowSource(split, data_config.sequence_length)
  )
  num_epochs = _ENDLESS // len(windows)
  shuffled = windows.shuffle(data_config.shuffle_seed).repeat(num_epochs)
  shards = shuffled.batch(rows)
  batches = shards[start_step * shard_count + shard_index :: shard_count]
  # The tokens are mapped memory: reader threads would only cost time.
  in_process = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(batches.to_iter_dataset(in_process))
