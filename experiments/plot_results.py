"""Draws a figure next to every JSONL file of results.

python -m experiments.plot_results --results=results
"""

from collections.abc import Sequence
import pathlib

from absl import app
from absl import flags

from experiments import kernel_figures


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_string('results', 'results', 'Directory of the JSONL files.')


def main(argv: Sequence[str]) -> None:
  """Draws results/x.png from the kernel rows of results/x.jsonl."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  directory = pathlib.Path(flags.FLAGS.results)
  paths = sorted(directory.glob('*.jsonl'))
  if not paths:
    raise app.UsageError(
      f'no .jsonl file in {directory}: run experiments.benchmark_kernels first'
    )
  for path in paths:
    rows = kernel_figures.read_rows(path)
    if rows:
      kernel_figures.draw_kernels(rows, path.with_suffix('.png'))
      print(f'wrote {path.with_suffix(".png")}')


if __name__ == '__main__':
  define_flags()
  app.run(main)
