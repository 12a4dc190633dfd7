"""Tests of recall and selective copying of MAD."""

import numpy as np

from experiments.synthetic import mad
from experiments.synthetic import task


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
