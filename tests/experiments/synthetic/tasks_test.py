"""Every generator draws the same examples on every machine."""

import hashlib

import numpy as np
import pytest

from experiments.synthetic import mad
from experiments.synthetic import mad_fuzzy
from experiments.synthetic import mad_memory
from experiments.synthetic import modular_arithmetic
from experiments.synthetic import mqar
from experiments.synthetic import regbench
from experiments.synthetic import state_tracking
from experiments.synthetic import tasks
from experiments.synthetic import word_problems

DIGESTS = (
  (mqar.MQARConfig(), '6c10c336148179c0'),
  (mad.RecallConfig(), '09c4fa5f3ca609cd'),
  (mad.NoisyRecallConfig(), 'bf84b7d395763271'),
  (mad_fuzzy.FuzzyRecallConfig(), 'dfc2758d4c80b514'),
  (mad_memory.MemorizationConfig(), 'c85cb934f1481cea'),
  (mad_memory.CompressionConfig(), 'e0da63051f4a3e70'),
  (mad.SelectiveCopyingConfig(), 'e81652b673012bcb'),
  (modular_arithmetic.ModularArithmeticConfig(), '55f0c5de904edd95'),
  (
    modular_arithmetic.ModularArithmeticConfig(brackets=True),
    '6c8217cfcbd3f9bf',
  ),
  (regbench.RegBenchConfig(), 'e277918e2cb7f259'),
  (state_tracking.ParityConfig(), 'f57070b363c0d630'),
  (word_problems.WordProblemConfig(), 'cd8e454482d8ce76'),
)


@pytest.mark.parametrize(('config', 'digest'), DIGESTS)
def test_examples_are_the_same_everywhere(config, digest):
  generate = tasks.generator(config)
  inputs, targets, _ = generate(config, num_examples=8, seed=123)
  assert inputs.dtype == targets.dtype == np.int32
  assert inputs.shape == targets.shape == (8, config.sequence_length)
  assert inputs.min() >= 0
  assert max(inputs.max(), targets.max()) < config.vocab_size
  found = hashlib.sha256(np.stack([inputs, targets]).tobytes()).hexdigest()
  assert found[:16] == digest


def test_every_generator_is_held_to_its_examples():
  assert {type(config) for config, _ in DIGESTS} == set(tasks.GENERATORS)


def test_what_is_no_task_is_refused():
  with pytest.raises(ValueError, match='must be one of MQARConfig.* got 3'):
    tasks.generator(3)
