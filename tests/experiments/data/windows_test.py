import numpy as np
import pytest

from experiments import config
from experiments.data import token_store
from experiments.data import windows


def make_split(lengths, seed=0):
  offsets = np.cumsum([0, *lengths])
  tokens = np.random.default_rng(seed).integers(1, 60_000, offsets[-1])
  return token_store.Split('train', tokens.astype('<u2'), offsets, 0)


def test_windows_share_one_token_and_count_their_documents():
  split = token_store.Split(
    'train', np.arange(10, 21, dtype='<u2'), np.array([0, 2, 3, 8, 11]), 0
  )
  source = windows.WindowSource(split, 4)
  expected = [
    ([10, 11, 12, 13, 14], [1, 1, 2, 3, 3]),
    ([14, 15, 16, 17, 18], [1, 1, 1, 1, 2]),
    ([18, 19, 20, 0, 0], [1, 1, 1, 0, 0]),
  ]
  assert len(source) == len(expected)
  for i, (tokens, segment_ids) in enumerate(expected):
    window = source[i]
    np.testing.assert_array_equal(window['tokens'], tokens)
    np.testing.assert_array_equal(window['segment_ids'], segment_ids)
    assert window['tokens'].dtype == window['segment_ids'].dtype == np.int32
  with pytest.raises(IndexError):
    source[3]


@pytest.mark.parametrize('length', [1, 2, 7, 29, 30, 31, 64])
def test_no_token_is_lost_or_invented(length):
  split = make_split([1, 1, 5, 13, 1, 10])
  source = windows.WindowSource(split, length)
  read = [split.tokens[:1]]
  for i in range(len(source)):
    window = source[i]
    kept = window['segment_ids'] > 0
    assert kept[1]
    assert (window['tokens'][~kept] == 0).all()
    read.append(window['tokens'][kept][1:])
  np.testing.assert_array_equal(np.concatenate(read), split.tokens)


@pytest.mark.parametrize('length', [3, 8, 50])
def test_segments_change_exactly_at_document_starts(length):
  split = make_split([1, 1, 5, 13, 1, 10])
  source = windows.WindowSource(split, length)
  for i in range(len(source)):
    ids = source[i]['segment_ids']
    ids = ids[ids > 0]
    assert ids[0] == 1
    starts = i * length + 1 + np.flatnonzero(np.diff(ids))
    inside = split.offsets[:-1] - i * length
    np.testing.assert_array_equal(
      starts - i * length, inside[(inside > 0) & (inside < len(ids))]
    )


@pytest.mark.parametrize('lengths', [[], [1]])
def test_a_split_without_targets_is_refused(lengths):
  with pytest.raises(ValueError, match="'train' has [01] tokens"):
    windows.WindowSource(make_split(lengths), 4)


SPLIT = make_split([37] * 11)
CONFIG = config.DataConfig(sequence_length=16, batch_size=6, shuffle_seed=3)


def batches(count, data_config=CONFIG, start_step=0, index=0, shards=1):
  iterator = windows.training_iterator(
    SPLIT,
    data_config,
    start_step=start_step,
    shard_index=index,
    shard_count=shards,
  )
  result = [next(iterator) for _ in range(count)]
  iterator.close()
  return result


def assert_equal(one, two):
  assert one.keys() == two.keys() == {'tokens', 'segment_ids'}
  for name in one:
    np.testing.assert_array_equal(one[name], two[name])


def test_batches_have_one_more_token_than_targets():
  (batch,) = batches(1)
  for array in batch.values():
    assert array.shape == (6, 17)
    assert array.dtype == np.int32


@pytest.mark.parametrize('step', [0, 1, 4, 5, 13, 29])
def test_resuming_anywhere_gives_the_same_batches(step):
  resumed = batches(32 - step, start_step=step)
  for one, two in zip(batches(32)[step:], resumed, strict=True):
    assert_equal(one, two)


@pytest.mark.parametrize('shards', [1, 2, 3, 6])
def test_shards_are_the_rows_of_the_batch(shards):
  whole = batches(4, start_step=9)
  parts = [
    batches(4, start_step=9, index=i, shards=shards) for i in range(shards)
  ]
  for step, batch in enumerate(whole):
    joined = {
      name: np.concatenate([part[step][name] for part in parts])
      for name in batch
    }
    assert_equal(batch, joined)


def epochs(data_config, count):
  source = windows.WindowSource(SPLIT, data_config.sequence_length)
  index = {source[i]['tokens'].tobytes(): i for i in range(len(source))}
  steps = -(-count * len(source) // data_config.batch_size)
  rows = np.concatenate([b['tokens'] for b in batches(steps, data_config)])
  order = np.array([index[row.tobytes()] for row in rows])
  return order[: count * len(source)].reshape(count, len(source))


def test_each_epoch_reads_every_window_once_in_a_new_order():
  orders = epochs(CONFIG, 3)
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), np.arange(orders.shape[1]))
    assert (order != np.arange(orders.shape[1])).any()
  assert len({tuple(order) for order in orders}) == 3


def test_the_seed_decides_the_order():
  other = config.DataConfig(sequence_length=16, batch_size=6, shuffle_seed=99)
  assert (epochs(CONFIG, 1) != epochs(other, 1)).any()
  np.testing.assert_array_equal(epochs(CONFIG, 1), epochs(CONFIG, 1))


def test_a_batch_may_exceed_the_epoch():
  large = config.DataConfig(sequence_length=16, batch_size=100)
  (batch,) = batches(1, large)
  assert batch['tokens'].shape == (100, 17)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'start_step': -1}, 'start_step'),
    ({'shard_index': 2, 'shard_count': 2}, 'shard_index'),
    ({'shard_count': 4}, 'multiple of the 4 shards'),
  ],
)
def test_wrong_arguments_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    windows.training_iterator(SPLIT, CONFIG, **arguments)
