"""Tests of memorization and compression."""

import numpy as np

from experiments.synthetic import mad_memory
from experiments.synthetic import task


def test_memorization_made_by_hand():
  config = mad_memory.MemorizationConfig(vocab_size=7, sequence_length=6)
  keys, table = np.array([[2, 0, 2]]), np.array([4, 3, 5])
  made = mad_memory.arrange_memorization(config, keys, table)
  _ = task.IGNORED
  assert made.inputs.tolist() == [[2, 6, 0, 6, 2, 6]]
  assert made.targets.tolist() == [[_, 5, _, 4, _, 5]]


def test_a_value_is_the_keys_in_every_example_whatever_the_seed():
  config = mad_memory.MemorizationConfig(vocab_size=10, sequence_length=8)
  table = mad_memory.value_table(10)
  assert len(set(table)) == 4 and set(table) <= set(range(4, 9))
  for seed in (0, 1):
    made = mad_memory.generate_memorization(config, num_examples=9, seed=seed)
    assert np.all(made.inputs[:, 0::2] < 4)
    assert np.all(made.inputs[:, 1::2] == 9)
    assert np.all(made.targets[:, 0::2] == task.IGNORED)
    np.testing.assert_array_equal(
      made.targets[:, 1::2], table[made.inputs[:, 0::2]]
    )


def test_compression_asks_for_all_of_its_row():
  config = mad_memory.CompressionConfig(vocab_size=5, sequence_length=40)
  inputs, targets, _ = mad_memory.generate_compression(
    config, num_examples=3, seed=0
  )
  np.testing.assert_array_equal(inputs, targets)
  assert np.all(inputs[:, -1] == 4)
  assert set(inputs[:, :-1].ravel()) == {0, 1, 2, 3}
