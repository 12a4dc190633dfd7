"""The registry of synthetic tasks: configuration -> generator."""

from collections.abc import Callable
from typing import Any

from experiments.synthetic import mad
from experiments.synthetic import mad_fuzzy
from experiments.synthetic import mad_memory
from experiments.synthetic import modular_arithmetic
from experiments.synthetic import mqar
from experiments.synthetic import regbench
from experiments.synthetic import state_tracking
from experiments.synthetic import task
from experiments.synthetic import word_problems

GENERATORS: dict[type, Callable[..., task.Examples]] = {
  mqar.MQARConfig: mqar.generate,
  mad.RecallConfig: mad.generate_recall,
  mad.NoisyRecallConfig: mad.generate_noisy_recall,
  mad_fuzzy.FuzzyRecallConfig: mad_fuzzy.generate,
  mad_memory.MemorizationConfig: mad_memory.generate_memorization,
  mad_memory.CompressionConfig: mad_memory.generate_compression,
  mad.SelectiveCopyingConfig: mad.generate_selective_copying,
  modular_arithmetic.ModularArithmeticConfig: modular_arithmetic.generate,
  regbench.RegBenchConfig: regbench.generate,
  state_tracking.ParityConfig: state_tracking.generate,
  word_problems.WordProblemConfig: word_problems.generate,
}


def generator(config: Any) -> Callable[..., task.Examples]:
  """Returns generate(config, *, num_examples, seed) of a configuration.

  Raises:
    ValueError: it is of no task.
  """
  if type(config) not in GENERATORS:
    known = ', '.join(kind.__name__ for kind in GENERATORS)
    raise ValueError(f'task must be one of {known}, got {config!r}')
  return GENERATORS[type(config)]
