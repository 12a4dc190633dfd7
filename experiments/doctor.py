"""Says what this machine runs: devices, versions, implementations and why.

python -m experiments.doctor
"""

from collections.abc import Iterator

from absl import app

from experiments import environment
from pallas_kernels import dispatch
from pallas_kernels.delta_rule import api as delta_rule_api
from pallas_kernels.delta_rule import product_api
from pallas_kernels.diagonal_plus_low_rank import api as low_rank_api
from pallas_kernels.linear_attention import api as linear_attention_api

OPS = (
  delta_rule_api.DELTA_RULE,
  product_api.DELTA_PRODUCT,
  low_rank_api.DIAGONAL_PLUS_LOW_RANK,
  linear_attention_api.LINEAR_ATTENTION,
)


def _op_lines(op: dispatch.Op) -> Iterator[str]:
  """Yields a line per implementation, in the order of the automatic choice."""
  is_chosen = True
  for name, reason in op.explain():
    if reason is not None:
      yield f'  {name:<18}cannot run: {reason}'
    elif is_chosen:
      yield f'  {name:<18}runs by default'
      is_chosen = False
    else:
      yield f'  {name:<18}can run'


def report() -> Iterator[str]:
  """Yields the lines of the report."""
  yield 'devices'
  yield f'  {environment.devices()}'
  yield 'versions'
  for package, version in environment.versions().items():
    yield f'  {package:<18}{version}'
  yield f'  {"commit":<18}{environment.commit()}'
  for op in OPS:
    yield op.name
    yield from _op_lines(op)


def main(argv: list[str]) -> None:
  """Prints the report."""
  if len(argv) > 1:
    raise app.UsageError(f'no arguments are taken, got {argv[1:]}')
  for line in report():
    print(line)


if __name__ == '__main__':
  app.run(main)
