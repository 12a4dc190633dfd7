"""Tests of parity."""

import numpy as np

from experiments.synthetic import state_tracking
from experiments.synthetic import task


def test_rows_made_by_hand():
  bits = np.array([[1, 0, 1, 1, 1], [0, 1, 1, 0, 1]])
  inputs, targets, _unused = state_tracking.arrange(bits, np.array([4, 5]))
  _ = task.IGNORED
  assert inputs.tolist() == [[2, 1, 2, 2, 0], [1, 2, 2, 1, 2]]
  assert targets.tolist() == [[_, _, _, 2, _], [_, _, _, _, 2]]


def test_the_last_bit_carries_the_parity():
  config = state_tracking.ParityConfig(min_length=2, max_length=9)
  inputs, targets, _ = state_tracking.generate(config, num_examples=200, seed=0)
  lengths = (inputs > 0).sum(axis=1)
  assert set(lengths) == set(range(2, 10))
  for row, target, length in zip(inputs, targets, lengths, strict=True):
    assert target[length - 1] == 1 + (row[:length] - 1).sum() % 2
    assert np.sum(target != task.IGNORED) == 1
