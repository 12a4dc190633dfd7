"""The default corpus: the Python sources that every installation has.

The standard library (PSF-2.0) and the packages this project depends on
(Apache-2.0), read in place: real text, without network. Its content follows
the installed versions; a token store records its fingerprint.
"""

from collections.abc import Iterator
import importlib.util
import os
import pathlib
import sysconfig

from experiments.data import text_files

PACKAGES = ('jax', 'flax', 'optax', 'orbax', 'grain', 'absl', 'etils')

_SUFFIXES = ('.py', '.pyi', '.md', '.txt')
_LEFT_OUT = frozenset(
  ['test', 'tests', 'idle_test', 'site-packages', 'dist-packages']
)


def default_files() -> list[text_files.SourceFile]:
  """Returns the files of the corpus, sorted by id.

  Ids read like `stdlib/json/decoder.py` and `jax/_src/api.py`. Empty files
  are left out: they hold no text.
  """
  roots = [('stdlib', pathlib.Path(sysconfig.get_path('stdlib')))]
  for package in PACKAGES:
    roots.extend((package, root) for root in _package_roots(package))
  files = [file for name, root in roots for file in _walk(name, root)]
  return sorted(files, key=lambda file: file.id)


def _package_roots(package: str) -> list[pathlib.Path]:
  spec = importlib.util.find_spec(package)
  if spec is None or spec.submodule_search_locations is None:
    raise ValueError(
      f'the default corpus reads the package {package}, which is not '
      'installed: install it, or name your own files'
    )
  return [pathlib.Path(p) for p in spec.submodule_search_locations]


def _walk(name: str, root: pathlib.Path) -> Iterator[text_files.SourceFile]:
  for directory, subdirectories, file_names in os.walk(root):
    subdirectories[:] = [
      d for d in subdirectories if d not in _LEFT_OUT and d != '__pycache__'
    ]
    for file_name in file_names:
      path = pathlib.Path(directory, file_name)
      if path.suffix in _SUFFIXES and path.stat().st_size:
        relative = path.relative_to(root).as_posix()
        yield text_files.SourceFile(f'{name}/{relative}', path)
