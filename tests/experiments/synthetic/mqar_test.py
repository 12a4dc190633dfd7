"""Tests of multi-query associative recall."""

import numpy as np

from experiments.synthetic import mqar
from experiments.synthetic import task


def test_a_row_made_by_hand():
  config = mqar.MQARConfig(vocab_size=14, sequence_length=12, num_pairs=2)
  keys, values, gaps = (
    np.array([[3, 5]]),
    np.array([[9, 7]]),
    np.array([[2, 0]]),
  )
  inputs, targets, _unused = mqar.arrange(config, keys, values, gaps)
  _ = task.IGNORED
  assert inputs.tolist() == [[3, 9, 5, 7, 5, 0, 0, 0, 3, 0, 0, 0]]
  assert targets.tolist() == [[_, _, _, _, 7, _, _, _, 9, _, _, _]]


def test_every_key_is_asked_once_and_its_value_is_the_target():
  config = mqar.MQARConfig(vocab_size=64, sequence_length=32, num_pairs=4)
  inputs, targets, _ = mqar.generate(config, num_examples=50, seed=3)
  for row, target in zip(inputs, targets, strict=True):
    keys, values = row[0:8:2], row[1:8:2]
    assert len(set(keys)) == len(set(values)) == 4
    assert np.all((keys >= 1) & (keys < 32) & (values >= 32))
    at = np.flatnonzero(target != task.IGNORED)
    assert sorted(row[at]) == sorted(keys)
    assert np.all(at >= 8) and np.all(at % 2 == 0)
    value_of = dict(zip(keys, values, strict=True))
    assert [value_of[key] for key in row[at]] == list(target[at])
    assert not np.any(np.delete(row[8:], at - 8))
