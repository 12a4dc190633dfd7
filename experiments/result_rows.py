"""Files of results: JSONL, a row per measurement, which says where it was made.

A row has a `kind`, by which `plot_results` draws it.
"""

from collections.abc import Iterable, Sequence
import datetime
import json
import os
import pathlib
from typing import Any

from experiments import atomic_file
from experiments import environment

Row = dict[str, Any]


def origin() -> Row:
  """Returns what a row of results says about where it comes from."""
  return {
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'commit': environment.commit(),
    'device': environment.devices(),
    'driver': environment.driver(),
    'versions': environment.versions(),
    'glibc_tunables': environment.glibc_tunables(),
  }


def _parse(line: str, where: str, needs: str | None) -> Row:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{where}: not JSON ({error}); repair or remove it'
    ) from error
  if not isinstance(row, dict) or (needs and needs not in row):
    wanted = f' with a {needs!r}' if needs else ''
    raise ValueError(
      f'{where}: must be a JSON object{wanted}, got {line[:80]!r}; repair or '
      'remove it'
    )
  return row


def read(
  path: str | os.PathLike, *, kind: str | None = None, needs: str | None = None
) -> list[Row]:
  """Returns the rows of a file, none if it is not there.

  Args:
    path: of the file.
    kind: rows of other kinds are left out; None: all are returned.
    needs: a field that every row must have.

  Raises:
    ValueError: a line is no JSON object, or lacks the field.
  """
  path = pathlib.Path(path)
  lines = path.read_text().splitlines() if path.exists() else []
  rows = [
    _parse(line, f'{path}, line {number}', needs)
    for number, line in enumerate(lines, start=1)
  ]
  return [row for row in rows if kind is None or row.get('kind') == kind]


def write(path: str | os.PathLike | None, rows: Iterable[Row]) -> None:
  """Replaces a file by these rows, and makes its folder; None: does nothing.

  Raises:
    OSError: the file cannot be written; the old one is untouched.
  """
  if path is None:
    return
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic_file.replace(path, ''.join(json.dumps(row) + '\n' for row in rows))


def require_device(path: str | os.PathLike | None) -> None:
  """Checks that a file may get rows of this machine; None: does nothing.

  Raises:
    ValueError: it has rows of another device, or cannot be read.
  """
  if path is None:
    return
  own, others = environment.devices(), {r.get('device') for r in read(path)}
  if others - {own}:
    raise ValueError(
      f'{path} must have rows of {own} alone to get more, got '
      f'{sorted(map(str, others))}; write to another file'
    )


def update(
  path: str | os.PathLike | None, rows: Iterable[Row], about: Sequence[str]
) -> None:
  """Writes rows over those of a file that are about the same; others stay.

  Args:
    path: of the file; None: does nothing.
    rows: in the order in which those that are new are appended.
    about: fields that say what a row is about; one that is missing is None.

  Raises:
    ValueError: the file cannot be read.
    OSError: as for `write`.
  """
  if path is None:
    return

  def subject(row):
    return json.dumps([row.get(name) for name in about], sort_keys=True)

  old, new = ({subject(row): row for row in x} for x in (read(path), rows))
  write(path, (old | new).values())
