"""Documents of text, .jsonl, .jsonl.gz and .parquet files, bad ones counted."""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import glob
import gzip
import json
import os
import pathlib
import zlib

_NUM_NAMED = 5

Row = tuple[int | None, 'str | _Bad']  # line from 1, or None: the whole file


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A file and the machine-independent id its documents go by."""

  id: str
  path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and its id: that of its file, and `:line` for a row of it."""

  id: str
  text: str


class BadDocumentsError(ValueError):
  """More documents are unreadable than the caller allows."""


def find_files(patterns: Sequence[str]) -> list[SourceFile]:
  """Returns the files of glob patterns, sorted by id, each once.

  A file's id is its path relative to the deepest directory that holds all of
  them, so that the same tree elsewhere has the same ids.

  Raises:
    ValueError: a pattern matches no file.
  """
  paths = set()
  for pattern in patterns:
    found = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    if not found:
      raise ValueError(
        f'no file matches {pattern!r}: give existing files or quoted glob '
        'patterns'
      )
    paths.update(os.path.abspath(p) for p in found)
  if not paths:
    return []
  root = os.path.commonpath([os.path.dirname(p) for p in paths])
  files = [
    SourceFile(pathlib.Path(p).relative_to(root).as_posix(), pathlib.Path(p))
    for p in paths
  ]
  return sorted(files, key=lambda file: file.id)


class Documents:
  """The documents of files, in order; may be iterated again and again.

  A file ending in .jsonl, .jsonl.gz or .parquet holds a document per row, any
  other is one document. Texts are kept to the byte (CRLF too). Unreadable
  documents are skipped and counted: broken JSON, a field that is missing or no
  string, invalid UTF-8, a NUL, no text at all, a byte-order mark, and the rest
  of a damaged gzip or parquet file.

  Attributes:
    files: what is read.
    num_read: documents that the latest iteration has read so far, bad ones
      included.
    bad_counts: of these, the bad ones by reason.
    first_bad: the first five of them, as `file:line: reason`.
  """

  def __init__(
    self,
    files: Sequence[SourceFile],
    *,
    text_field: str = 'text',
    max_bad_fraction: float = 0.001,
  ):
    self.files = tuple(files)
    self.num_read = 0
    self.bad_counts: collections.Counter[str] = collections.Counter()
    self.first_bad: list[str] = []
    self._text_field = text_field
    self._max_bad_fraction = max_bad_fraction

  def __iter__(self) -> Iterator[Document]:
    """Yields the good documents.

    Raises:
      BadDocumentsError: at the end, when the share of bad documents is above
        `max_bad_fraction`.
    """
    self.num_read = 0
    self.bad_counts.clear()
    self.first_bad = []
    for file in self.files:
      for line, text in _rows(file.path, self._text_field):
        self.num_read += 1
        if isinstance(text, str):
          text = _checked_text(text)
        if isinstance(text, _Bad):
          self._count_bad(f'{file.path}{_suffix(line)}', text.reason)
        else:
          yield Document(file.id + _suffix(line), text)
    self._check_bad_fraction()

  def _count_bad(self, place: str, reason: str) -> None:
    self.bad_counts[reason] += 1
    if len(self.first_bad) < _NUM_NAMED:
      self.first_bad.append(f'{place}: {reason}')

  def _check_bad_fraction(self) -> None:
    num_bad = self.bad_counts.total()
    if num_bad > self._max_bad_fraction * self.num_read:
      raise BadDocumentsError(
        f'{num_bad} of {self.num_read} documents are unreadable, above '
        f'max_bad_fraction={self._max_bad_fraction}; repair or leave out the '
        'files, or raise max_bad_fraction. The first are:\n  '
        + '\n  '.join(self.first_bad)
      )


@dataclasses.dataclass(frozen=True)
class _Bad:
  reason: str


def _suffix(line: int | None) -> str:
  return '' if line is None else f':{line}'


def _rows(path: pathlib.Path, field: str) -> Iterator[Row]:
  if path.name.endswith(('.jsonl', '.jsonl.gz')):
    return _jsonl_rows(path, field)
  if path.name.endswith('.parquet'):
    return _parquet_rows(path, field)
  return iter([(None, _decoded(path.read_bytes()))])


def _jsonl_rows(path: pathlib.Path, field: str) -> Iterator[Row]:
  line = 0
  opener = gzip.open if path.name.endswith('.gz') else open
  with opener(path, 'rb') as lines:
    try:
      for line, raw in enumerate(lines, start=1):
        yield line, _json_field(raw, field)
    except (EOFError, gzip.BadGzipFile, zlib.error):
      yield line + 1, _Bad('truncated or damaged gzip')


def _parquet_rows(path: pathlib.Path, field: str) -> Iterator[Row]:
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError as error:
    raise ImportError(
      f"{path} needs the package pyarrow: pip install 'deltanet-jax[data]'"
    ) from error
  line = 0
  try:
    with parquet.ParquetFile(path) as file:
      if field not in file.schema_arrow.names:
        raise ValueError(
          f'{path} has no column {field!r}, only {file.schema_arrow.names}: '
          'set text_field'
        )
      for batch in file.iter_batches(columns=[field]):
        for value in batch.column(0):
          line += 1
          yield line, _parquet_text(value)
  except (pyarrow.ArrowInvalid, OSError) as error:
    if not path.is_file():
      raise
    yield line + 1, _Bad(f'damaged parquet ({type(error).__name__})')


def _parquet_text(value) -> 'str | _Bad':
  try:
    text = value.as_py()
  except UnicodeDecodeError:
    return _Bad('invalid UTF-8')
  return text if isinstance(text, str) else _Bad('text is not a string')


def _json_field(raw: bytes, field: str) -> 'str | _Bad':
  if not raw.strip():
    return _Bad('empty')
  line = _decoded(raw)
  if isinstance(line, _Bad):
    return line
  if line.startswith('\ufeff'):
    return _Bad('byte-order mark')
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return _Bad('broken JSON')
  if not isinstance(row, dict) or field not in row:
    return _Bad(f'no field {field!r}')
  text = row[field]
  return text if isinstance(text, str) else _Bad('text is not a string')


def _decoded(raw: bytes) -> 'str | _Bad':
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError:
    return _Bad('invalid UTF-8')


def _checked_text(text: str) -> 'str | _Bad':
  if not text:
    return _Bad('empty')
  if text.startswith('\ufeff'):
    return _Bad('byte-order mark')
  if '\0' in text:
    return _Bad('NUL character')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
    return _Bad('lone surrogate')
  return text
