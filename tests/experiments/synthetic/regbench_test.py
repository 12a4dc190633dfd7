"""Tests of RegBench: automata, prompts and what is allowed after a token."""

import numpy as np

from experiments.synthetic import metrics
from experiments.synthetic import regbench
from experiments.synthetic import task

_SEP = regbench.SEPARATOR


def test_allowed_letters_of_an_automaton_made_by_hand():
  automaton = [{1: 1, 2: 2}, {3: 0}, {1: 0, 4: 1}]
  got = regbench.allowed_after(automaton, [2, 4, 3, _SEP, 1])
  assert got == [[1, 4], [3], [1, 2], [1, 2], [3]]


def test_automata_have_the_published_sizes():
  random = np.random.default_rng(0)
  automata = [regbench.draw_automaton(random) for _ in range(300)]
  assert {len(x) for x in automata} == set(range(4, 13))
  degrees = {len(node) for x in automata for node in x}
  assert degrees == {1, 2, 3}
  for automaton in automata:
    for i, node in enumerate(automaton):
      targets = list(node.values())
      assert i not in targets and len(set(targets)) == len(targets)
      assert all(1 <= letter <= 18 for letter in node)


def test_prompts_are_strings_of_the_automaton():
  random = np.random.default_rng(1)
  counts, lengths = set(), set()
  for _ in range(200):
    automaton = regbench.draw_automaton(random)
    prompt = regbench.draw_prompt(random, automaton)
    after = regbench.allowed_after(automaton, prompt)
    for token, allowed in zip(prompt[1:], after, strict=False):
      assert token == _SEP or token in allowed
    ends = [-1, *np.flatnonzero(np.array(prompt) == _SEP), len(prompt)]
    counts.add(len(ends) - 1)
    lengths |= set(np.diff(ends) - 1)
  assert counts == set(range(10, 20)) and lengths == set(range(1, 50))


def test_targets_are_the_next_letters_and_always_allowed():
  config = regbench.RegBenchConfig(max_length=128, knows_allowed=True)
  examples = regbench.generate(config, num_examples=20, seed=0)
  inputs, targets, _ = examples
  assert inputs.shape == targets.shape == (20, 127)
  np.testing.assert_array_equal(
    targets[:, :-1] == task.IGNORED,
    (inputs[:, 1:] == _SEP) | (inputs[:, 1:] == 0),
  )
  scored = targets[:, :-1] != task.IGNORED
  np.testing.assert_array_equal(targets[:, :-1][scored], inputs[:, 1:][scored])
  assert metrics.accuracies(targets, examples)['dfa'] == 1
  wrong = np.full_like(targets, _SEP)
  assert metrics.accuracies(wrong, examples)['dfa'] == 0
