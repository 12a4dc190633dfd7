"""Tests of fuzzy recall."""

import numpy as np
import pytest

from experiments.synthetic import mad_fuzzy
from experiments.synthetic import task

_ = task.IGNORED


def test_a_row_made_by_hand():
  keys = [(0, 1), (2,), (2,), (0, 1)]
  values = [(5,), (6, 7), (8,), (9,)]
  row, targets = mad_fuzzy.arrange(keys, values, probe_at=4, limit=12)
  assert row == [2, 6, 7, 2, 6, 7, 0, 1, 5, 0, 1, 5, 0, 1, 5]
  assert targets == [_, _, _, _, 6, 7, _, _, _, _, _, 5, _, _, 5]


@pytest.mark.parametrize('length', [18, 31, 64])
def test_the_last_key_was_there_and_rows_are_padded_on_the_left(length):
  config = mad_fuzzy.FuzzyRecallConfig(vocab_size=9, sequence_length=length)
  inputs, targets, _ = mad_fuzzy.generate(config, num_examples=60, seed=1)
  assert inputs.shape == targets.shape == (60, length)
  for row, target in zip(inputs, targets, strict=True):
    begin = np.argmax(row != 8)
    assert np.all(row[:begin] == 8) and not np.any(row[begin:] == 8)
    size = int(np.argmax(target[::-1] == task.IGNORED))
    assert 1 <= size <= 3
    whole = [*row[begin:], target[-1]]
    asked = whole[-3 - size :]
    assert asked[3:] == list(target[-size:])
    assert len(set(asked[:3])) == 3 and max(asked[:3]) < 4
    before = range(len(whole) - 2 * (3 + size) + 1)
    assert any(whole[i : i + 3 + size] == asked for i in before)


def test_training_scores_the_padding_too():
  config = mad_fuzzy.FuzzyRecallConfig(scores_all=True)
  inputs, targets, _ = mad_fuzzy.generate(config, num_examples=4, seed=0)
  np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
