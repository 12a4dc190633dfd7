"""RegBench: in-context learning of regular languages, arXiv 2401.12973.

Akyürek et al.; as in https://github.com/berlino/seq_icl, 9b9223d1, with the
vocabulary of https://github.com/berlino/seq-test, cb15a8da, but for the random
numbers: the authors' hash of the split's name differs from process to process.
"""

import dataclasses

import numpy as np

from experiments.synthetic import task

NUM_LETTERS = 18
SEPARATOR = NUM_LETTERS + 1
_NODES = (4, 12)
_ALPHABET = (4, 18)
_EDGES = (1, 3)
_STRINGS = (10, 19)
_STRING_LENGTHS = (1, 49)

# A node's edges: letter, 1 .. NUM_LETTERS -> node. Node 0 is the start.
Automaton = list[dict[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegBenchConfig:
  """Strings of one random automaton, another one in every example.

  Attributes:
    max_length: a prompt is cut to that many tokens; a row is one shorter.
    knows_allowed: the examples have `allowed`, which the DFA accuracy needs.
  """

  max_length: int = 512
  knows_allowed: bool = False

  def __post_init__(self):
    # The shortest prompt has ten strings of one letter, nine separators.
    task.require(
      self.max_length >= 3,
      'max_length must be at least 3',
      max_length=self.max_length,
    )

  @property
  def vocab_size(self) -> int:
    """Padding 0, the letters and the separator."""
    return NUM_LETTERS + 2

  @property
  def sequence_length(self) -> int:
    """Tokens of a row."""
    return self.max_length - 1


def _draw(random: np.random.Generator, bounds: tuple[int, int]) -> int:
  return int(random.integers(bounds[0], bounds[1] + 1))


def draw_automaton(random: np.random.Generator) -> Automaton:
  """Returns an automaton of which all nodes accept and none has a self loop.

  It is not minimised: nodes that accept the same go on with the same letters,
  so neither the strings' distribution nor what is allowed would change.
  """
  num_nodes, size = _draw(random, _NODES), _draw(random, _ALPHABET)
  alphabet = 1 + random.permutation(NUM_LETTERS)[:size]
  nodes = []
  for node in range(num_nodes):
    degree = _draw(random, _EDGES)
    letters = alphabet[random.permutation(size)[:degree]]
    others = np.delete(np.arange(num_nodes), node)
    targets = others[random.permutation(num_nodes - 1)[:degree]]
    nodes.append(dict(zip(letters.tolist(), targets.tolist(), strict=True)))
  return nodes


def draw_prompt(random: np.random.Generator, automaton: Automaton) -> list[int]:
  """Returns strings of the automaton, a separator between them."""
  edges = [list(node.items()) for node in automaton]
  prompt: list[int] = []
  for number in range(_draw(random, _STRINGS)):
    prompt += [SEPARATOR] * (number > 0)
    node = 0
    for uniform in random.random(_draw(random, _STRING_LENGTHS)).tolist():
      letter, node = edges[node][int(uniform * len(edges[node]))]
      prompt.append(letter)
  return prompt


def allowed_after(automaton: Automaton, prompt: list[int]) -> list[list[int]]:
  """Returns the letters that may follow every token of a prompt."""
  node, result = 0, []
  for token in prompt:
    node = 0 if token == SEPARATOR else automaton[node][token]
    result.append(list(automaton[node]))
  return result


def generate(
  config: RegBenchConfig, *, num_examples: int, seed: int
) -> task.Examples:
  """Returns examples; every next letter is a target, no separator is."""
  random = np.random.default_rng(seed)
  shape = num_examples, config.sequence_length
  inputs = np.zeros(shape, np.int32)
  targets = np.full(shape, task.IGNORED, np.int32)
  allowed = None
  if config.knows_allowed:
    allowed = np.zeros((*shape, config.vocab_size), bool)
  for i in range(num_examples):
    automaton = draw_automaton(random)
    prompt = draw_prompt(random, automaton)[: config.max_length]
    inputs[i, : len(prompt) - 1] = prompt[:-1]
    targets[i, : len(prompt) - 1] = prompt[1:]
    if allowed is not None:
      for t, letters in enumerate(allowed_after(automaton, prompt[:-1])):
        allowed[i, t, letters] = True
  targets[targets == SEPARATOR] = task.IGNORED
  return task.Examples(inputs, targets, allowed)
