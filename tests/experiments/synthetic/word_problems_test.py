"""Tests of word problems."""

import numpy as np
import pytest

from experiments.synthetic import task
from experiments.synthetic import word_problems


@pytest.mark.parametrize(
  ('group', 'order'),
  [('S3', 6), ('S4', 24), ('A5', 60), ('S5', 120), ('Z60', 60)],
)
def test_the_table_is_the_groups(group, order):
  table = word_problems.product_table(group)
  assert table.shape == (order, order)
  np.testing.assert_array_equal(table[0], np.arange(order))
  np.testing.assert_array_equal(table[:, 0], np.arange(order))
  np.testing.assert_array_equal(table[table, 1], table[:, table[:, 1]])


def test_a_cyclic_group_adds():
  table = word_problems.product_table('Z5')
  assert table[3, 4] == 2 and table[2, 2] == 4
  elements = word_problems.elements('Z5')
  for i, x in enumerate(elements):
    for j, y in enumerate(elements):
      np.testing.assert_array_equal(elements[table[i, j]], x[y])


def test_a_row_made_by_hand():
  table = word_problems.product_table('Z5')
  inputs, targets, _ = word_problems.arrange(table, np.array([[3, 4, 0, 1]]))
  assert inputs.tolist() == [[5, 3, 4, 0, 1]]
  assert targets.tolist() == [[task.IGNORED, 3, 2, 2, 3]]


def test_targets_are_products_up_to_there():
  config = word_problems.WordProblemConfig(group='S3', length=5)
  inputs, targets, _ = word_problems.generate(config, num_examples=9, seed=1)
  elements = word_problems.elements('S3')
  assert np.all(inputs[:, 0] == 6) and np.all(targets[:, 0] == task.IGNORED)
  for row, target in zip(inputs[:, 1:], targets[:, 1:], strict=True):
    product = np.arange(3)
    for word, expected in zip(row, target, strict=True):
      product = product[elements[word]]
      np.testing.assert_array_equal(elements[expected], product)
