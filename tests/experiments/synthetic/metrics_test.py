"""Tests of the accuracies, on predictions made by hand."""

import numpy as np
import pytest

from experiments.synthetic import metrics
from experiments.synthetic import task

_ = task.IGNORED


def _examples(targets, allowed=None):
  targets = np.array(targets, np.int32)
  return task.Examples(np.zeros_like(targets), targets, allowed)


def test_micro_example_and_sequence_averages_differ():
  examples = _examples([[1, 2, 3, 4], [_, _, _, 5]])
  got = metrics.accuracies(np.array([[1, 2, 9, 9], [7, 7, 7, 5]]), examples)
  assert got['token'] == pytest.approx(3 / 5)
  assert got['example'] == pytest.approx((2 / 4 + 1) / 2)
  assert got['sequence'] == pytest.approx(1 / 2)
  assert 'dfa' not in got


def test_macro_counts_every_class_alike():
  # Class 0: 3 of 4; class 1: 0 of 1; class 2: predicted and never a target.
  examples = _examples([[0, 0, 0, 0, 1]])
  got = metrics.accuracies(np.array([[0, 0, 0, 2, 0]]), examples)
  assert got['token'] == pytest.approx(3 / 5)
  assert got['macro'] == pytest.approx((3 / 4 + 0 + 0) / 3)


def test_macro_is_a_mean_over_batches_of_128():
  targets = np.zeros((129, 1), np.int32)
  predicted = np.zeros((129, 1), np.int32)
  predicted[128] = 1
  got = metrics.accuracies(predicted, _examples(targets))
  assert got['macro'] == pytest.approx((1 + 0) / 2)
  assert got['token'] == pytest.approx(128 / 129)


def test_dfa_accuracy_takes_any_allowed_symbol_and_no_ignored_position():
  allowed = np.zeros((1, 3, 4), bool)
  allowed[0, 0, [1, 3]] = True
  allowed[0, 2, 2] = True
  examples = _examples([[1, _, 2]], allowed)
  assert metrics.accuracies(np.array([[3, 0, 2]]), examples)['dfa'] == 1
  assert metrics.accuracies(np.array([[2, 0, 2]]), examples)['dfa'] == 0.5
  assert metrics.accuracies(np.array([[3, 0, 2]]), examples)['token'] == 0.5


def test_a_position_is_right_where_all_before_it_are():
  examples = _examples([[1, 2, 3, 4], [1, _, 3, 4]])
  predicted = np.array([[1, 0, 3, 4], [1, 0, 3, 0]])
  bins = metrics.by_position(predicted, examples, num_bins=4)
  assert [(b['first'], b['last'], b['count'], b['accuracy']) for b in bins] == [
    (0, 0, 2, 1.0),
    (1, 1, 1, 0.0),
    (2, 2, 2, 0.5),
    (3, 3, 2, 0.0),
  ]


def test_bins_without_targets_are_left_out():
  bins = metrics.by_position(
    np.array([[0, 0, 0, 5]]), _examples([[_, _, _, 5]]), num_bins=2
  )
  assert [b['first'] for b in bins] == [2]


@pytest.mark.parametrize(
  ('shape', 'targets', 'message'),
  [
    ((1, 2), [[1, 2, 3]], 'shape of the targets'),
    ((2, 1), [[1], [_]], 'got none in example 1'),
  ],
)
def test_refuses_what_cannot_be_scored(shape, targets, message):
  with pytest.raises(ValueError, match=message):
    metrics.accuracies(np.zeros(shape, int), _examples(targets))
