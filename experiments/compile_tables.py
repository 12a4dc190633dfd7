"""Tables of compiled train steps, of one in full and of many in Markdown."""

from collections.abc import Iterable, Iterator, Sequence
import os
import pathlib

from experiments import compile_suite
from experiments import pod_compilation
from experiments import result_rows
from experiments import scaling

_GIB = 2**30
_PARTS = ('parameter', 'optimizer', 'activation', 'temp', 'total', 'chip')
_HEADER = (
  'model',
  'context',
  'mesh',
  'remat',
  'parameters',
  'optimizer',
  'activations',
  'temp',
  'total',
  'of a chip',
  'TFLOP',
  'memory traffic, GB',
  'sent, GB',
  'step, s',
  'MFU',
)


def _mesh(row: pod_compilation.Row) -> str:
  sizes = {axis: n for axis, n in row['mesh'].items() if n > 1}
  return ' '.join(f'{axis}={n}' for axis, n in sizes.items()) or 'one chip'


def describe(row: pod_compilation.Row) -> Iterator[str]:
  """Yields the lines of a report about one step, all numbers per chip."""
  yield f'{row["target"]}: {row["num_chips"]} chips, {_mesh(row)}'
  yield (
    f'{row["batch_size"]} rows of {row["sequence_length"]} tokens, '
    f'remat {row["remat"]}, compiled in {row["compile_seconds"]:.0f} s'
  )
  yield 'per chip:'
  for part in _PARTS:
    size = row['memory'].get(f'{part}_bytes')
    if size is not None:
      name = {'chip': 'memory of the chip', 'temp': 'temporary'}.get(part, part)
      yield f'  {name:20} {size / _GIB:10.3f} GiB'
  if not row['fits']:
    yield f'  DOES NOT FIT; {row["advice"]}'
  if 'flops' not in row:
    return
  yield f'  {"FLOPs":20} {row["flops"] / 1e12:10.3f} TFLOP'
  yield f'  {"of the formula":20} {row["model_flops"] / 1e12:10.3f} TFLOP'
  traffic = row['memory_traffic_bytes']
  yield f'  {"memory traffic":20} {traffic / 1e9:10.3f} GB'
  for sent in row['collectives']:
    name = f'{sent["kind"]} over {", ".join(sent["axes"])}'
    times = f'{sent["executions"]} times'
    yield f'  {name:40} {sent["bytes"] / 1e9:10.4f} GB in {times}'
  yield from _estimated(row['estimate'])


def _estimated(found: pod_compilation.Row) -> Iterator[str]:
  clocks = ', '.join(f'{n} {s:.4f}' for n, s in found['seconds'].items())
  yield f'estimate, not a measurement: seconds of {clocks}'
  yield (
    f'  step at least {found["step_seconds"]:.4f} s (by {found["bound_by"]}), '
    f'{found["step_seconds_nothing_hidden"]:.4f} s with nothing hidden'
  )
  yield (
    f'  MFU at most {found["mfu"]:.1%}, {found["mfu_nothing_hidden"]:.1%} with '
    'nothing hidden'
  )


def _cells(row: pod_compilation.Row) -> Iterator[str]:
  memory = row['memory']
  yield row['model']
  yield f'{row["sequence_length"] // 1024}K'
  yield _mesh(row)
  yield row['remat']
  for part in ('parameter', 'optimizer', 'activation', 'temp', 'total'):
    size = memory.get(f'{part}_bytes')
    yield '' if size is None else f'{size / _GIB:.2f}'
  share = memory['total_bytes'] / memory['chip_bytes']
  yield f'{share:.0%}' + ('' if row['fits'] else ', does not fit')
  if 'flops' not in row:
    yield from [''] * 5
    return
  found = row['estimate']
  yield f'{row["flops"] / 1e12:.0f}'
  yield f'{row["memory_traffic_bytes"] / 1e9:.0f}'
  yield f'{sum(x["bytes"] for x in row["collectives"]) / 1e9:.2f}'
  longest = found['step_seconds']
  yield f'{longest:.2f} to {found["step_seconds_nothing_hidden"]:.2f}'
  yield f'{found["mfu_nothing_hidden"]:.0%} to {found["mfu"]:.0%}'


def _line(cells: Iterable[str]) -> str:
  return f'| {" | ".join(cells)} |'


def _place(row: pod_compilation.Row) -> int:
  return compile_suite.CASES.index(compile_suite.case_of(row))


def markdown(
  rows: Iterable[pod_compilation.Row],
  missing: Iterable[compile_suite.Case] = (),
) -> Iterator[str]:
  """Yields the lines of a document: a table a machine, and what is missing."""
  rows = list(rows)
  yield '# Train steps of DeltaNet, compiled for machines that are not there'
  yield ''
  yield (
    f'{compile_suite.TOKENS:,} tokens a step; all numbers are per chip, memory '
    'in GiB. Step and MFU are estimates by a roofline, not measured: from all '
    'clocks hidden behind the longest to none hidden.'
  )
  rows.sort(key=_place)
  for target in dict.fromkeys(row['target'] for row in rows):
    yield from ('', f'## {target}', '')
    yield _line(_HEADER)
    yield _line(['---'] * len(_HEADER))
    for row in rows:
      if row['target'] == target:
        yield _line(_cells(row))
  advice = [row for row in rows if row['advice']]
  if advice:
    yield ''
  for row in advice:
    yield (
      f'* {row["model"]}, {row["sequence_length"] // 1024}K on '
      f'{row["target"]} does not fit; {row["advice"]}.'
    )
  not_done = [
    f'{case.model} {case.context // 1024}K on {case.machine}'
    for case in missing
  ]
  if not_done:
    yield from ('', f'Not compiled yet: {", ".join(not_done)}.')


def run(
  output: str | os.PathLike = '', machines: Sequence[str] | None = None
) -> Iterator[str]:
  """Adds the rows that are missing, yields a line each, and writes the table.

  The table is Markdown beside the rows, and written after every one of them.

  Args:
    output: the file of the rows; empty: that of results/.
    machines: None: all.
  """
  path = pathlib.Path(output or 'results/compiled_models.jsonl')
  for row in compile_suite.run(path, machines or compile_suite.MACHINES):
    write(path)
    yield _line(_cells(row))
  write(path)


def run_scaling(
  output: str | os.PathLike = '', machines: Sequence[str] | None = None
) -> Iterator[str]:
  """Adds the rows of `scaling` that are missing, and yields a line each.

  Args:
    output: the file of the rows; empty: that of results/.
    machines: none can be chosen.

  Raises:
    ValueError: one is chosen.
  """
  if machines:
    raise ValueError(f'the suite scaling takes no --target, got {machines}')
  for row in scaling.run(pathlib.Path(output or 'results/scaling.jsonl')):
    yield scaling.describe(row)


SUITES = {'models': run, 'scaling': run_scaling}


def write(path: pathlib.Path) -> None:
  """Writes the Markdown of the rows of a file beside it."""
  rows, missing = result_rows.read(path), compile_suite.missing(path)
  lines = markdown(rows, missing)
  path.with_suffix('.md').write_text('\n'.join(lines) + '\n')
