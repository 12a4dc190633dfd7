"""Tests of recall and selective copying of MAD."""

import numpy as np

from experiments.synthetic import mad
from experiments.synthetic import task

_ = task.IGNORED


def test_recall_made_by_hand():
  keys = np.array([[0, 2, 0, 2, 1]])
  value_of = np.array([[5, 4, 3]])
  kept = np.array([[True, False, True, True, True]])
  inputs, targets, _unused = mad.arrange_recall(keys, value_of, kept)
  assert inputs.tolist() == [[0, 5, 2, 3, 0, 5, 2, 3, 1, 4]]
  # The second pair does not count, so that its key is new in the fourth.
  assert targets.tolist() == [[_, _, _, _, _, 5, _, _, _, _]]


def test_noise_put_by_hand():
  row = np.array([[0, 5, 2, 3, 0, 5, 2, 3]])
  kept = np.array([[True, False, True]])
  mad.put_noise(row, kept, np.array([[[7, 6], [6, 7], [6, 6]]]))
  assert row.tolist() == [[0, 5, 6, 7, 0, 5, 2, 3]]


def test_copies_made_by_hand():
  config = mad.SelectiveCopyingConfig(
    vocab_size=6, sequence_length=10, num_copied=3
  )
  before = np.array([[0, 2, 2]])
  inputs, targets, _unused = mad.arrange_copies(
    config, np.array([[3, 0, 1]]), before
  )
  assert inputs.tolist() == [[4, 3, 0, 4, 4, 1, 5, 4, 4, 4]]
  assert targets.tolist() == [[_, _, _, _, _, _, _, 3, 0, 1]]


def test_recall_scores_the_values_of_seen_keys_alone():
  config = mad.RecallConfig(vocab_size=8, length=12)
  inputs, targets, _ = mad.generate_recall(config, num_examples=40, seed=0)
  assert inputs.shape == targets.shape == (40, 11)
  for row, target in zip(inputs, targets, strict=True):
    seen = {}
    for i in range(0, 11, 2):
      assert target[i] == seen.get(row[i], task.IGNORED)
      if i + 1 < 11:
        assert seen.setdefault(row[i], row[i + 1]) == row[i + 1]
    assert target[10] != task.IGNORED


def test_recall_scores_every_next_token_in_training():
  config = mad.RecallConfig(vocab_size=8, length=12, scores_all=True)
  inputs, targets, _ = mad.generate_recall(config, num_examples=4, seed=0)
  np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])


def test_noise_is_no_key_and_no_target():
  config = mad.NoisyRecallConfig(
    vocab_size=11, num_noise=3, length=24, noise_fraction=0.6
  )
  inputs, targets, _ = mad.generate_noisy_recall(
    config, num_examples=200, seed=0
  )
  noisy = inputs[:, 0::2] >= 8
  assert not noisy[:, -1].any() and not noisy.all(axis=1).any()
  # One of 11 pairs never is.
  assert abs(noisy[:, :-1].mean() - 0.6 * 10 / 11) < 0.05
  for row, target in zip(inputs, targets, strict=True):
    seen = {}
    for i in range(0, 23, 2):
      if row[i] >= 8:
        assert row[i + 1] >= 8 and target[i] == task.IGNORED
        continue
      assert target[i] == seen.get(row[i], task.IGNORED)
      if i + 1 < 23:
        assert seen.setdefault(row[i], row[i + 1]) == row[i + 1]
    assert target[22] != task.IGNORED


def test_copying_asks_for_the_tokens_in_order():
  config = mad.SelectiveCopyingConfig(
    vocab_size=6, sequence_length=16, num_copied=4
  )
  inputs, targets, _ = mad.generate_selective_copying(
    config, num_examples=30, seed=0
  )
  for row, target in zip(inputs, targets, strict=True):
    np.testing.assert_array_equal(row[:11][row[:11] != 4], target[-4:])
    assert row[10] != 4 and row[11] == 5 and np.all(row[12:] == 4)
    assert np.all(target[:-4] == task.IGNORED)
