"""Draws a figure next to every JSONL file of results.

python -m experiments.plot_results --results=results
python -m experiments.plot_results --figure=mqar      of the synthetic tasks
"""

from collections.abc import Sequence
import itertools
import pathlib

from absl import app
from absl import flags

from experiments import kernel_figures
from experiments import mixer_figures
from experiments import scaling
from experiments import scaling_figures
from experiments import throughput_figures
from experiments.synthetic import figures as synthetic_figures
from experiments.synthetic import sweeping


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_string('results', 'results', 'Directory of the JSONL files.')
  text = 'The one to draw; unset: one next to every file of other results.'
  flags.DEFINE_enum('figure', None, list(synthetic_figures.FIGURES), text)


def main(argv: Sequence[str]) -> None:
  """Draws results/x.png from the rows of known kinds in x.jsonl."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  directory = pathlib.Path(flags.FLAGS.results)
  paths = sorted(directory.glob('*.jsonl'))
  if not paths:
    raise app.UsageError(
      f'no .jsonl file in {directory}: run experiments.benchmark_kernels first'
    )
  if flags.FLAGS.figure:
    found = (kernel_figures.read_rows(p, sweeping.KIND) for p in paths)
    rows = list(itertools.chain.from_iterable(found))
    print(synthetic_figures.draw(flags.FLAGS.figure, rows, directory))
    return
  draw = {
    'kernel': kernel_figures.draw_kernels,
    'mixer': mixer_figures.draw_mixers,
    'throughput': throughput_figures.draw_throughput,
    scaling.KIND: scaling_figures.draw_scaling,
  }
  for path, kind in itertools.product(paths, draw):
    rows = kernel_figures.read_rows(path, kind)
    if rows:
      draw[kind](rows, path.with_suffix('.png'))
      print(f'wrote {path.with_suffix(".png")}')


if __name__ == '__main__':
  define_flags()
  app.run(main)
