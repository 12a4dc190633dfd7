"""Tests of modular arithmetic, against Python's own arithmetic."""

import numpy as np
import pytest

from experiments.synthetic import modular_arithmetic
from experiments.synthetic import task

_PLAIN = {1: '+', 2: '-', 3: '*'} | {5 + i: str(i) for i in range(5)}
_BRACKETS = {5: '+', 6: '-', 8: '(', 9: ')'} | {i: str(i) for i in range(5)}


def test_products_come_first():
  # 4 - 3 * 2 + 1 = -1; 2 * 3 = 6, where the row ends.
  numbers = np.array([[4, 3, 2, 1], [2, 3, 4, 4]])
  operators = np.array([[2, 3, 1], [3, 0, 0]])
  got = modular_arithmetic.evaluate(numbers, operators)
  np.testing.assert_array_equal(got, [4, 1])


def test_an_expression_made_by_hand():
  # Of 8 tokens: 2 on the left (-3), then +, then 3 on the right, ((4)).
  draws = iter([0.3, 0.9, 0.6, 0.8])
  tokens, value = modular_arithmetic.build_expression(8, draws)
  assert ''.join(_BRACKETS[t] for t in tokens) == '(-3+(4))'
  assert value == 1


@pytest.mark.parametrize('brackets', [False, True])
def test_the_value_is_the_target_at_the_equals_sign(brackets):
  config = modular_arithmetic.ModularArithmeticConfig(
    min_length=5, max_length=20, brackets=brackets
  )
  inputs, targets, _ = modular_arithmetic.generate(
    config, num_examples=600, seed=0
  )
  symbols, equals, pad = (_BRACKETS, 10, 11) if brackets else (_PLAIN, 4, 0)
  lengths = set()
  for row, target in zip(inputs, targets, strict=True):
    (at,) = np.flatnonzero(target != task.IGNORED)
    assert row[at] == equals and np.all(row[at + 1 :] == pad)
    value = eval(''.join(symbols[t] for t in row[:at])) % 5  # noqa: S307
    assert target[at] == value + (0 if brackets else 5)
    lengths.add(at + (3 if brackets else 2))
  assert lengths == set(range(5, 21) if brackets else range(5, 20, 2))


def test_a_length_without_an_expression_is_refused():
  for changes, message in (
    ({'min_length': 4, 'max_length': 4}, 'an odd length must be'),
    ({'min_length': 2}, 'in 3 .. max_length, got min_length=2'),
    ({'min_length': 4, 'brackets': True}, 'in 5 .. max_length'),
  ):
    with pytest.raises(ValueError, match=message):
      modular_arithmetic.ModularArithmeticConfig(**changes)
