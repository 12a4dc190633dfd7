"""Replaces a file in one step: readers see the old or the new one, whole."""

import os
import pathlib


def replace(path: str | os.PathLike, data: bytes | str) -> None:
  """Writes `data` to `path`; a crash or power cut leaves old or new contents.

  Raises:
    OSError: the file cannot be written; the old one is untouched.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.tmp')
  contents = data.encode() if isinstance(data, str) else data
  try:
    with temporary.open('wb') as file:
      file.write(contents)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)
    raise
  directory = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(directory)
  finally:
    os.close(directory)
