"""Modular arithmetic with and without brackets: Grazzi et al., 2411.12537.

Values are modulo 5. Written from the description of the tasks, not from code;
how an expression in brackets is cut in two is our choice.
"""

from collections.abc import Iterator
import dataclasses

import numpy as np

from experiments.synthetic import task

MODULUS = 5
# Without brackets.
_PLUS, _MINUS, _TIMES, _EQUALS, _FIRST = 1, 2, 3, 4, 5
# With brackets; numbers are 0 .. 4.
B_PLUS, B_MINUS, B_TIMES, B_OPEN, B_CLOSE, B_EQUALS, B_PAD = range(5, 12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularArithmeticConfig:
  """Sums and products; the value is asked at the equals sign.

  A length counts the tokens of the expression, the equals sign and the value,
  and with brackets the padding behind them. Without brackets it is odd.

  Attributes:
    min_length: least length.
    max_length: greatest length; shorter rows end in padding.
    brackets: sums in brackets, without products, instead of sums of products.
  """

  min_length: int = 5
  max_length: int = 40
  brackets: bool = False

  def __post_init__(self):
    least = 5 if self.brackets else 3
    task.require(
      least <= self.min_length <= self.max_length,
      f'min_length must be in {least} .. max_length',
      min_length=self.min_length,
      max_length=self.max_length,
    )
    task.require(
      self.brackets or self.odd_lengths[0] <= self.odd_lengths[1],
      'an odd length must be in min_length .. max_length',
      min_length=self.min_length,
      max_length=self.max_length,
    )

  @property
  def odd_lengths(self) -> tuple[int, int]:
    """The least and the greatest odd length."""
    return self.min_length | 1, self.max_length - 1 + self.max_length % 2

  @property
  def vocab_size(self) -> int:
    """Padding, operators, the equals sign, numbers; two brackets."""
    return 12 if self.brackets else 10

  @property
  def sequence_length(self) -> int:
    """Tokens of a row: all but the value."""
    return self.max_length - 1


def evaluate(numbers: np.ndarray, operators: np.ndarray) -> np.ndarray:
  """Returns the values [N], products first, of n0 o0 n1 o1 ... modulo 5.

  Args:
    numbers: int [N, M].
    operators: int [N, M - 1], tokens; 0 ends the expression.
  """
  total, term = np.zeros(len(numbers), int), numbers[:, 0]
  for number, operator in zip(numbers.T[1:], operators.T, strict=True):
    adds = (operator == _PLUS) | (operator == _MINUS)
    total = np.where(adds, total + term, total)
    signed = np.where(operator == _MINUS, -number, number)
    term = np.where(adds, signed, term)
    term = np.where(operator == _TIMES, term * number % MODULUS, term)
  return (total + term) % MODULUS


def _generate_plain(config, num_examples: int, random) -> task.Examples:
  first, last = config.odd_lengths
  length = 2 * random.integers(first // 2, last // 2 + 1, (num_examples, 1)) + 1
  most = last // 2
  numbers = random.integers(0, MODULUS, (num_examples, most))
  operators = random.integers(_PLUS, _EQUALS, (num_examples, most - 1))
  # Number i is token 2 i, operator i token 2 i + 1, the equals sign length - 2.
  operators = np.where(2 * np.arange(most - 1) + 1 < length - 2, operators, 0)
  position = np.arange(config.sequence_length)[None]
  inputs = np.zeros((num_examples, config.sequence_length), np.int32)
  inputs[:, 0 : 2 * most : 2] = numbers + _FIRST
  inputs[:, 1 : 2 * most - 1 : 2] = operators
  inputs = np.where(position < length - 2, inputs, 0)
  inputs = np.where(position == length - 2, _EQUALS, inputs)
  value = evaluate(numbers, operators)[:, None] + _FIRST
  targets = np.where(position == length - 2, value, task.IGNORED)
  return task.Examples(inputs.astype(np.int32), targets.astype(np.int32))


def build_expression(
  length: int, uniforms: Iterator[float]
) -> tuple[list[int], int]:
  """Returns an expression of that many tokens in brackets, and its value.

  Up to four tokens: n, -n, (n), (-n). Longer ones are (left o right), the
  length of the left one uniform; o is + or -.
  """
  if length < 5:
    number = int(next(uniforms) * MODULUS)
    negative = length % 2 == 0
    tokens = [B_MINUS] * negative + [number]
    if length > 2:
      tokens = [B_OPEN, *tokens, B_CLOSE]
    return tokens, (-number if negative else number) % MODULUS
  size = 1 + int(next(uniforms) * (length - 4))
  subtracts = next(uniforms) < 0.5
  left, x = build_expression(size, uniforms)
  right, y = build_expression(length - 3 - size, uniforms)
  operator = B_MINUS if subtracts else B_PLUS
  value = (x - y if subtracts else x + y) % MODULUS
  return [B_OPEN, *left, operator, *right, B_CLOSE], value


def _generate_brackets(config, num_examples: int, random) -> task.Examples:
  shape = num_examples, config.sequence_length
  inputs = np.full(shape, B_PAD, np.int32)
  targets = np.full(shape, task.IGNORED, np.int32)
  lengths = random.integers(
    config.min_length, config.max_length + 1, num_examples
  )
  for i, length in enumerate((lengths - 3).tolist()):
    uniforms = iter(random.random(length).tolist())
    inputs[i, :length], targets[i, length] = build_expression(length, uniforms)
    inputs[i, length] = B_EQUALS
  return task.Examples(inputs, targets)


def generate(
  config: ModularArithmeticConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples whose lengths are uniform; one target each."""
  random = np.random.default_rng(seed)
  make = _generate_brackets if config.brackets else _generate_plain
  return make(config, num_examples, random)
