"""Draws a figure next to every JSONL file of results.

python -m experiments.plot_results [--results=results] [--figure=mqar]
"""

from collections.abc import Sequence
import itertools
import pathlib

from absl import app
from absl import flags

from experiments import kernel_figures
from experiments import length_figures
from experiments import mixer_figures
from experiments import result_rows
from experiments import scaling_figures
from experiments import throughput_figures
from experiments.synthetic import figures as synthetic_figures


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_string('results', 'results', 'Directory of the JSONL files.')
  names = [*synthetic_figures.FIGURES, 'length']
  flags.DEFINE_enum('figure', None, names, 'Unset: all but the synthetic ones.')


def main(argv: Sequence[str]) -> None:
  """Draws results/x.png from the rows of known kinds in x.jsonl."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  directory = pathlib.Path(flags.FLAGS.results)
  paths = sorted(directory.glob('*.jsonl'))
  name = flags.FLAGS.figure
  if name in synthetic_figures.FIGURES:
    rows = [r for p in paths for r in result_rows.read(p, kind='synthetic')]
    print(synthetic_figures.draw(name, rows, directory))
    return
  draw = {
    'kernel': kernel_figures.draw_kernels,
    'mixer': mixer_figures.draw_mixers,
    'throughput': throughput_figures.draw_throughput,
    'length': length_figures.draw_length,
    'scaling': scaling_figures.draw_scaling,
  }
  drawn = []
  for path, kind in itertools.product(paths, [name] if name else draw):
    if rows := result_rows.read(path, kind=kind):
      drawn.append(path.with_suffix('.png'))
      draw[kind](rows, drawn[-1])
      print(f'wrote {drawn[-1]}')
  if not drawn:
    problem = f'no .jsonl file in {directory} has a row of {name or "a figure"}'
    raise app.UsageError(f'{problem}: run the program that measures it first')


if __name__ == '__main__':
  define_flags()
  app.run(main)
