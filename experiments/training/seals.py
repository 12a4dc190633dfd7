"""A seal over a directory: sizes and digests of every file in it.

`seal` writes the manifest `CHECKSUMS.json` into a finished directory; `damage`
compares the directory with it. The manifest carries a digest of itself, so a
flipped bit in it is seen as well.

Of several processes that wrote a directory together, each digests a share of
the files (`digests`), and one of them seals with what all found. A share is the
same function of names and sizes in every process.
"""

import functools
import hashlib
import json
import os
import pathlib
from typing import Any

from experiments import atomic_file

MANIFEST = 'CHECKSUMS.json'
_blake2b = functools.partial(hashlib.blake2b, digest_size=32)


Share = tuple[int, int]  # Number of a process, and of all processes.
WHOLE: Share = (0, 1)


def digests(
  directory: pathlib.Path, *, share: Share = WHOLE
) -> dict[str, dict[str, Any]]:
  """Makes files durable and returns what a manifest says of them.

  Args:
    directory: holds files that nobody writes any more.
    share: whose files of the directory.

  Returns:
    Size and digest of each file by its name.

  Raises:
    OSError: a file cannot be read or flushed.
  """
  return {
    name: {'bytes': path.stat().st_size, 'blake2b': _digest(path, flush=True)}
    for name, path in _share_of(_files(directory), share).items()
  }


def seal(
  directory: pathlib.Path, files: dict[str, dict[str, Any]] | None = None
) -> None:
  """Makes the files of a directory durable and writes their manifest.

  Every file and folder is flushed to the disk; the manifest appears whole or
  not at all.

  Args:
    directory: holds files that nobody writes any more.
    files: what `digests` returned for all shares; None: digests all here.

  Raises:
    OSError: a file cannot be read, flushed or written; or there are other
      files than those digested.
  """
  files = digests(directory) if files is None else files
  odd = sorted(files.keys() ^ _files(directory).keys())
  if odd:
    raise FileNotFoundError(
      f'{directory}/{odd[0]} is not seen alike by all processes: the directory '
      'of a run must be on a file system that they share'
    )
  text = json.dumps({'files': files, 'blake2b': _digest_of(files)}, indent=1)
  atomic_file.replace(directory / MANIFEST, text)
  for folder, _, _ in os.walk(directory):
    flush_directory(folder)


def damage(
  directory: pathlib.Path,
  *,
  read_contents: bool = True,
  share: Share = WHOLE,
) -> str | None:
  """Returns what differs between a directory and its manifest, or None.

  Args:
    directory: the sealed directory.
    read_contents: compare the digest of every file; False compares the names
      and sizes alone, which reads nothing but the manifest.
    share: whose files to read; names are compared by all.

  Returns:
    One line naming the first file that differs, None when all is well. An
    unreadable file counts as damaged.
  """
  if not (directory / MANIFEST).is_file():
    return f'{MANIFEST}: missing'
  try:
    expected = _read_manifest(directory)
    found = _files(directory)
    odd = sorted(expected.keys() ^ found.keys())
    if odd:
      return f'{odd[0]}: {"missing" if odd[0] in expected else "unexpected"}'
    for name, path in _share_of(found, share).items():
      problem = _file_damage(path, expected[name], read_contents)
      if problem:
        return f'{name}: {problem}'
  except OSError as error:
    return f'{error.filename}: {error.strerror}'
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    return f'{MANIFEST}: unreadable ({type(error).__name__})'
  return None


def flush_directory(directory: str | os.PathLike) -> None:
  """Makes the names in a directory durable (a rename is not, by itself)."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the files below a directory, without the manifest, by name."""
  paths = sorted(p for p in directory.rglob('*') if not p.is_dir())
  names = {path.relative_to(directory).as_posix(): path for path in paths}
  return {name: path for name, path in names.items() if name != MANIFEST}


def _share_of(
  files: dict[str, pathlib.Path], share: Share
) -> dict[str, pathlib.Path]:
  """Returns every n-th file, from the largest on."""
  index, count = share
  if count == 1:
    return files
  names = sorted(files, key=lambda name: (-files[name].stat().st_size, name))
  return {name: files[name] for name in names[index::count]}


def _read_manifest(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / MANIFEST
  manifest = json.loads(path.read_text(encoding='utf-8'))
  files = manifest['files']
  if manifest['blake2b'] != _digest_of(files):
    raise ValueError(f'{path} does not match its own digest')
  return files


def _file_damage(
  path: pathlib.Path, expected: dict[str, Any], read_contents: bool
) -> str | None:
  size = path.stat().st_size
  if size != expected['bytes']:
    return f'{size} bytes instead of {expected["bytes"]}'
  if read_contents and _digest(path) != expected['blake2b']:
    return 'its contents changed'
  return None


def _digest(path: pathlib.Path, *, flush: bool = False) -> str:
  with path.open('rb') as file:
    if flush:
      os.fsync(file.fileno())
    return hashlib.file_digest(file, _blake2b).hexdigest()


def _digest_of(files: dict[str, Any]) -> str:
  canonical = json.dumps(files, sort_keys=True, separators=(',', ':'))
  return _blake2b(canonical.encode()).hexdigest()
