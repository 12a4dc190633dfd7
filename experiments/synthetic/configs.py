"""Named runs and sweeps: `train_synthetic --task --config`, `sweep --sweep`."""

from collections.abc import Callable

from experiments.synthetic import config as config_lib
from experiments.synthetic import configs_cpu
from experiments.synthetic import configs_paper

SWEEPS: dict[str, Callable[[], list[config_lib.RunConfig]]] = {
  'mqar_cpu': configs_cpu.mqar_cpu,
  'mad_cpu': configs_cpu.mad_cpu,
  'parity_cpu': configs_cpu.parity_cpu,
  'word_problem_cpu': configs_cpu.word_problem_cpu,
  'mqar_gpu': configs_paper.mqar_gpu,
  'mqar_paper': configs_paper.mqar_paper,
}
