"""The rows of a run: one JSON object a line, and TensorBoard event files.

A row is {"kind": "train" | "eval", "step": 10, "loss": 2.5, ...}. Floats are
written so that they read back exactly; what JSON has no number for is written
as the string "nan", "inf" or "-inf", and read back as a float.
"""

from collections.abc import Mapping
import json
import math
import os
import pathlib
from typing import Any

from experiments import atomic_file
from experiments.training import event_file
from experiments.training import workdir as workdir_lib

Row = dict[str, Any]

KINDS = ('train', 'eval')
_NON_FINITE = ('nan', 'inf', '-inf')


def _to_json(value: float) -> float | int | str:
  number = value if isinstance(value, int) else float(value)
  return number if math.isfinite(number) else str(number)


def _parse(path: pathlib.Path, number: int, line: bytes) -> Row:
  try:
    row = json.loads(line)
    is_row = row['kind'] in KINDS and isinstance(row['step'], int)
  except (ValueError, TypeError, KeyError):
    is_row = False
  if not is_row:
    raise ValueError(
      f'{path}, line {number}: not a row of metrics: {line[:80]!r}; repair or '
      'remove that line'
    )
  return {
    name: float(value) if value in _NON_FINITE else value
    for name, value in row.items()
  }


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, Row]]:
  """Returns the whole lines of a metrics file and their rows."""
  if not path.exists():
    return []
  *lines, _ = path.read_bytes().split(b'\n')
  return [
    (line + b'\n', _parse(path, number, line))
    for number, line in enumerate(lines, start=1)
  ]


def read_rows(path: pathlib.Path) -> list[Row]:
  """Returns the rows of a metrics file, in order; none if there is no file.

  A last line without its newline is one that is being written, or one that was
  torn by a kill: it does not count.

  Raises:
    ValueError: another line is not a row; names the line.
  """
  return [row for _, row in _read_lines(path)]


class MetricsWriter:
  """Appends rows; at most one for each kind and step.

  Rows that are on disk already are kept, but for a torn last line. A run that
  goes on from a checkpoint calls `truncate_after` first.
  """

  def __init__(self, workdir: workdir_lib.Workdir):
    self._path = workdir.metrics
    self._tensorboard = workdir.tensorboard
    self._events: event_file.EventFile | None = None
    self._purge_step: int | None = None
    self._reopen(last_step=math.inf)

  def _reopen(self, *, last_step: float) -> None:
    """Drops what is torn or later than `last_step` and opens the file."""
    kept = [
      (line, row)
      for line, row in _read_lines(self._path)
      if row['step'] <= last_step
    ]
    contents = b''.join(line for line, _ in kept)
    if self._path.exists() and self._path.stat().st_size != len(contents):
      atomic_file.replace(self._path, contents)
    self._written = {(row['kind'], row['step']) for _, row in kept}
    self._file = self._path.open('a')

  def truncate_after(self, step: int) -> None:
    """Drops the rows of later steps, for a run restored at `step`.

    TensorBoard is told to drop its points of later steps too.
    """
    self.close()
    self._purge_step = step + 1
    self._reopen(last_step=step)

  def has(self, kind: str, step: int) -> bool:
    """Returns whether the row of that kind and step is written."""
    return (kind, step) in self._written

  def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
    """Writes one row and hands it to the operating system.

    Raises:
      ValueError: the kind is unknown, a value is called 'kind' or 'step', or
        the row of that kind and step is written already.
    """
    if kind not in KINDS:
      raise ValueError(f'kind must be one of {", ".join(KINDS)}, got {kind!r}')
    if {'kind', 'step'} & values.keys():
      raise ValueError("no value may be called 'kind' or 'step'")
    if self.has(kind, step):
      raise ValueError(
        f'the {kind} row of step {step} is written already; call '
        'truncate_after(restored step) before going on from a checkpoint'
      )
    row = {'kind': kind, 'step': step}
    row |= {name: _to_json(value) for name, value in values.items()}
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    self._file.flush()
    self._written.add((kind, step))
    self._write_events(kind, step, values)

  def _write_events(
    self, kind: str, step: int, values: Mapping[str, float]
  ) -> None:
    if self._events is None:
      self._events = event_file.EventFile(
        self._tensorboard, purge_step=self._purge_step
      )
    self._events.write(
      step, {f'{kind}/{name}': value for name, value in values.items()}
    )

  def sync(self) -> None:
    """Brings the rows to the disk: a power cut then loses none of them."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the files; a second call does nothing."""
    self._file.close()
    if self._events is not None:
      self._events.close()
      self._events = None

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()


class NoMetrics:
  """Stands for a `MetricsWriter` in the processes that write none."""

  def truncate_after(self, step: int) -> None:
    """Does nothing."""

  def has(self, kind: str, step: int) -> bool:
    """Returns False: there are no rows."""
    del kind, step
    return False

  def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
    """Does nothing."""

  def sync(self) -> None:
    """Does nothing."""

  def __enter__(self) -> 'NoMetrics':
    return self

  def __exit__(self, *unused_exception) -> None:
    pass
