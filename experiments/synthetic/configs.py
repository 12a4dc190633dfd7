"""Named runs and sweeps: `train_synthetic --task --config`, `sweep --sweep`."""

from collections.abc import Callable
import functools

from experiments.synthetic import config as config_lib
from experiments.synthetic import configs_cpu
from experiments.synthetic import configs_mad
from experiments.synthetic import configs_paper
from experiments.synthetic import configs_regbench
from experiments.synthetic import configs_state

SWEEPS: dict[str, Callable[[], list[config_lib.RunConfig]]] = {
  'mqar_cpu': configs_cpu.mqar_cpu,
  'mad_cpu': configs_cpu.mad_cpu,
  'parity_cpu': configs_cpu.parity_cpu,
  'word_problem_cpu': configs_cpu.word_problem_cpu,
  'mqar_gpu': configs_paper.mqar_gpu,
  'mad_gpu': configs_mad.mad_gpu,
  'mqar_paper': configs_paper.mqar_paper,
  'mad_paper': configs_mad.mad_paper,
  'regbench_paper': configs_regbench.regbench_paper,
  'state_tracking_paper': configs_state.state_tracking_paper,
  'word_problem_paper': configs_state.word_problem_paper,
}

# (task, size) -> the run of a mixer.
_RUNS: dict[tuple[str, str], Callable[[str], config_lib.RunConfig]] = {
  ('mqar', 'cpu'): configs_cpu.mqar_run,
  ('mqar', 'paper'): configs_paper.mqar_run,
  ('in_context_recall', 'cpu'): lambda mixer: configs_cpu.mad_run(
    'in_context_recall', mixer
  ),
  ('selective_copying', 'cpu'): lambda mixer: configs_cpu.mad_run(
    'selective_copying', mixer
  ),
  ('parity', 'cpu'): configs_cpu.parity_run,
  ('word_problem', 'cpu'): configs_cpu.word_problem_run,
  ('parity', 'paper'): configs_state.parity_run,
  ('modular_arithmetic', 'cpu'): configs_state.modular_cpu_run,
  ('modular_arithmetic', 'paper'): configs_state.modular_run,
  ('word_problem', 'paper'): configs_state.word_problem_run,
  ('regbench', 'cpu'): configs_regbench.cpu_run,
  ('regbench', 'paper'): configs_regbench.run,
}
_RUNS |= {
  (name, 'paper'): functools.partial(configs_mad.run, name)
  for name in configs_mad.TASKS
}


def build(task: str, size: str, mixer: str) -> config_lib.RunConfig:
  """Returns the named run.

  Raises:
    ValueError: there is no such task, size of it, or mixer.
  """
  if (task, size) not in _RUNS:
    known = ', '.join('/'.join(names) for names in _RUNS)
    raise ValueError(
      f'task and config must be one of {known}, got {task}/{size}'
    )
  return _RUNS[task, size](mixer)
