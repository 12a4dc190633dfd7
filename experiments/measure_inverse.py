"""Measures the triangular inverse of a chunk against float64.

Example:
    python -m experiments.measure_inverse \
        --output=results/inverse_accuracy.jsonl
"""

from collections.abc import Sequence
import itertools

from absl import app
from absl import flags

from experiments import inverse_accuracy
from experiments import result_rows


def define_flags() -> None:
  """Defines the flags of this program."""
  flags.DEFINE_string('output', None, 'JSONL file of the results; replaced.')


def main(argv: Sequence[str]) -> None:
  """Prints a table and writes the rows."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  rows, origin = [], result_rows.origin()
  print(f'{"cosine":>6} {"beta":>4} {"C":>4} {"float32":>9} {"float64":>9}')
  for cosine, beta, chunk in itertools.product(
    inverse_accuracy.COSINES, inverse_accuracy.BETAS, inverse_accuracy.CHUNKS
  ):
    matrix = inverse_accuracy.lower(cosine, beta, chunk)
    error = inverse_accuracy.errors(matrix)
    print(
      f'{cosine:>6} {beta:>4} {chunk:>4} {error["float32"]:>9.1e} '
      f'{error["float64"]:>9.1e}'
    )
    shape = {'cosine': cosine, 'beta': beta, 'chunk': chunk}
    rows.append({'kind': 'inverse', **shape, 'errors': error, **origin})
  result_rows.write(flags.FLAGS.output, rows)


if __name__ == '__main__':
  define_flags()
  app.run(main)
