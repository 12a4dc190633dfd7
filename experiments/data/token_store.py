"""A memory-mapped store of tokenised documents.

    DIRECTORY/meta.json             written last; sizes, digests, fingerprints
    DIRECTORY/{train,validation,test}/
      tokens.bin                    uint16 or uint32, little endian
      offsets.npy                   int64 [documents + 1], document starts

Every document is BOS and its tokens. The directory appears by one rename of a
finished sibling: a store either opens whole or does not exist.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any, BinaryIO, Self

from absl import logging
import numpy as np

from experiments.data import store_meta
from experiments.data import text_files
from experiments.data import tokenizers
from experiments.training import shutdown

_MEGABYTE = 1_000_000
_PROGRESS_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Split:
  """The tokens of one split.

  Attributes:
    name: one of `store_meta.SPLITS`.
    tokens: all documents after one another, each opened by BOS.  # [N]
    offsets: document starts, and N at the end.  # [documents + 1]
    num_bytes: UTF-8 bytes of the documents' text.
  """

  name: str
  tokens: np.ndarray
  offsets: np.ndarray
  num_bytes: int

  @property
  def num_documents(self) -> int:
    """Documents of the split."""
    return len(self.offsets) - 1

  def document(self, index: int) -> np.ndarray:
    """Returns the tokens of a document, without BOS."""
    return self.tokens[self.offsets[index] + 1 : self.offsets[index + 1]]


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """An opened store; its tokens stay on disk until they are read."""

  directory: pathlib.Path
  meta: store_meta.StoreMeta

  @classmethod
  def open(cls, directory: str | os.PathLike[str]) -> Self:
    """Opens a store and checks the sizes of its files.

    Raises:
      ValueError: no store, one of another format, or a damaged one.
    """
    directory = pathlib.Path(directory)
    store = cls(directory, store_meta.read(directory))
    for name in store_meta.SPLITS:
      store._check_sizes(name)
    return store

  @property
  def fingerprint(self) -> str:
    """The sha256 of what decides the store's tokens, as hex."""
    identity = json.dumps(self.meta.identity(), sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()

  def split(self, name: str) -> Split:
    """Returns a split by its name, one of `store_meta.SPLITS`."""
    if name not in store_meta.SPLITS:
      raise ValueError(
        f'split must be one of {store_meta.SPLITS}, got {name!r}'
      )
    path = self.directory / name
    if self.meta.splits[name].num_tokens:
      tokens = np.memmap(path / 'tokens.bin', self.meta.dtype, mode='r')
    else:  # an empty file cannot be mapped
      tokens = np.empty(0, self.meta.dtype)
    offsets = np.load(path / 'offsets.npy', mmap_mode='r')
    return Split(name, tokens, offsets, self.meta.splits[name].num_bytes)

  def verify(self) -> None:
    """Reads every byte and raises ValueError where a digest differs."""
    for name, split in self.meta.splits.items():
      for file_name, digest in (
        ('tokens.bin', split.tokens_digest),
        ('offsets.npy', split.offsets_digest),
      ):
        path = self.directory / name / file_name
        if store_meta.file_digest(path) != digest:
          raise ValueError(f'{path} is damaged: {store_meta.REBUILD}')

  def summary(self) -> str:
    """Returns one line for the log."""
    parts = [
      f'{name} {split.num_documents:,} documents, {split.num_tokens:,} tokens, '
      f'{split.num_bytes:,} bytes'
      for name, split in self.meta.splits.items()
    ]
    skipped = sum(self.meta.bad_counts.values())
    reasons = ', '.join(f'{n} {r}' for r, n in self.meta.bad_counts.items())
    parts.append(f'{skipped} skipped' + (f' ({reasons})' if reasons else ''))
    return f'Token store {self.directory}: ' + '; '.join(parts)

  def _check_sizes(self, name: str) -> None:
    split = self.meta.splits[name]
    path = self.directory / name
    expected = split.num_tokens * np.dtype(self.meta.dtype).itemsize
    tokens = path / 'tokens.bin'
    if not tokens.is_file() or tokens.stat().st_size != expected:
      raise ValueError(
        f'{tokens} has not {expected} bytes: {store_meta.REBUILD}'
      )
    try:
      offsets = np.load(path / 'offsets.npy', mmap_mode='r')
    except (ValueError, OSError) as error:
      raise ValueError(
        f'{path}/offsets.npy: {error}: {store_meta.REBUILD}'
      ) from error
    if (
      offsets.shape != (split.num_documents + 1,)
      or offsets.dtype != np.int64
      or offsets[0] != 0
      or offsets[-1] != split.num_tokens
    ):
      raise ValueError(f'{path}/offsets.npy does not fit: {store_meta.REBUILD}')


class SourcesHash:
  """The sha256 over (document id, sha256 of the text), in reading order."""

  def __init__(self):
    self._hash = hashlib.sha256()

  def add(self, document_id: str, text: bytes) -> None:
    """Takes in a document; `text` is UTF-8."""
    self._hash.update(_id_digest(document_id))
    self._hash.update(hashlib.sha256(text).digest())

  def hexdigest(self) -> str:
    """Returns the hash of all documents so far."""
    return self._hash.hexdigest()


def split_of(document_id: str, modulus: int) -> str:
  """Returns the name of a document's split.

  With sha256(id) as a big-endian integer, that is `validation` where the
  integer is 0 modulo `modulus`, `test` where it is 1, and `train` elsewhere.
  """
  remainder = int.from_bytes(_id_digest(document_id)) % modulus
  return store_meta.SPLITS[min(remainder, len(store_meta.SPLITS) - 1)]


def write_store(
  directory: str | os.PathLike[str],
  documents: text_files.Documents,
  tokenizer: tokenizers.Tokenizer,
  *,
  held_out_modulus: int,
  stop: shutdown.ShutdownRequest | None = None,
) -> TokenStore:
  """Tokenises documents into a store, or reuses an equal one.

  Args:
    directory: where the store goes; absent, empty, or an equal store.
    documents: read once to write a store, once to recognise an equal one.
    tokenizer: of all documents.
    held_out_modulus: one document in this many is for validation, and one
      for the test.
    stop: looked at before every document.

  Raises:
    ValueError: the directory holds something else, or no document would be
      left to train on.
    text_files.BadDocumentsError: too many documents are unreadable.
    shutdown.ShutdownError: asked to stop; the directory is as it was.
  """
  if held_out_modulus < 1:
    raise ValueError(
      f'held_out_modulus must be at least 1, got {held_out_modulus}'
    )
  directory = pathlib.Path(directory)
  if directory.exists() and any(directory.iterdir()):
    if not (directory / store_meta.FILE_NAME).exists():
      raise ValueError(
        f'{directory} holds other files: choose an absent or empty directory'
      )
    return _reuse(directory, documents, tokenizer, held_out_modulus, stop)
  directory.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    prefix=f'.{directory.name}.', suffix='.unfinished', dir=directory.parent
  ) as temporary:
    staged = pathlib.Path(temporary, 'store')
    meta = _write(staged, documents, tokenizer, held_out_modulus, stop)
    try:
      os.rename(staged, directory)
    except OSError as error:
      if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
        raise
      # Another process finished first: its store serves if it is the same.
      _check_identity(TokenStore.open(directory), meta.identity())
  return TokenStore.open(directory)


class _SplitWriter:
  """Appends documents to the files of a split."""

  def __init__(self, directory: pathlib.Path, dtype: str, bos_id: int):
    directory.mkdir(parents=True)
    self._directory = directory
    self._dtype = dtype
    self._bos_id = bos_id
    self._tokens = (directory / 'tokens.bin').open('wb')
    self._offsets = [0]
    self._digest = store_meta.new_digest()
    self._num_bytes = 0

  def add(self, ids: np.ndarray, num_bytes: int) -> None:
    """Appends a document of `num_bytes` bytes of text."""
    record = np.empty(len(ids) + 1, self._dtype)
    record[0] = self._bos_id
    record[1:] = ids
    self._tokens.write(record.data)
    self._digest.update(record.data)
    self._offsets.append(self._offsets[-1] + len(record))
    self._num_bytes += num_bytes

  def finish(self) -> store_meta.SplitMeta:
    """Writes the offsets, makes all durable and returns the sizes."""
    _close_durably(self._tokens)
    path = self._directory / 'offsets.npy'
    with path.open('wb') as file:
      np.save(file, np.array(self._offsets, np.int64))
      _close_durably(file)
    return store_meta.SplitMeta(
      num_documents=len(self._offsets) - 1,
      num_tokens=self._offsets[-1],
      num_bytes=self._num_bytes,
      tokens_digest=self._digest.hexdigest(),
      offsets_digest=store_meta.file_digest(path),
    )

  def close(self) -> None:
    """Closes the file, finished or not."""
    self._tokens.close()


def _write(
  directory: pathlib.Path,
  documents: text_files.Documents,
  tokenizer: tokenizers.Tokenizer,
  modulus: int,
  stop: shutdown.ShutdownRequest | None,
) -> store_meta.StoreMeta:
  dtype = '<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4'
  writers = {
    name: _SplitWriter(directory / name, dtype, tokenizer.bos_id)
    for name in store_meta.SPLITS
  }
  try:
    sources = _fill(writers, documents, tokenizer, modulus, stop)
    meta = store_meta.StoreMeta(
      format_version=store_meta.FORMAT_VERSION,
      dtype=dtype,
      vocab_size=tokenizer.vocab_size,
      tokenizer=tokenizer.name,
      tokenizer_fingerprint=tokenizer.fingerprint,
      sources_fingerprint=sources.hexdigest(),
      held_out_modulus=modulus,
      bad_counts=dict(documents.bad_counts),
      splits={name: writer.finish() for name, writer in writers.items()},
    )
  finally:
    for writer in writers.values():
      writer.close()
  if not meta.splits['train'].num_documents:
    raise ValueError(
      f'none of {documents.num_read} documents is left to train on: name '
      f'other files or raise held_out_modulus, now {modulus}'
    )
  with (directory / store_meta.FILE_NAME).open('wb') as file:
    file.write(json.dumps(dataclasses.asdict(meta), indent=2).encode())
    _close_durably(file)
  return meta


def _fill(
  writers: Mapping[str, _SplitWriter],
  documents: text_files.Documents,
  tokenizer: tokenizers.Tokenizer,
  modulus: int,
  stop: shutdown.ShutdownRequest | None,
) -> SourcesHash:
  sources = SourcesHash()
  num_bytes = 0
  for document in _until_asked(documents, stop):
    text = document.text.encode('utf-8')
    sources.add(document.id, text)
    split = split_of(document.id, modulus)
    writers[split].add(tokenizer.encode(document.text), len(text))
    num_bytes += len(text)
    if num_bytes > _MEGABYTE:
      logging.log_every_n_seconds(
        logging.INFO,
        'Tokenised %s documents, %.1f MB',
        _PROGRESS_SECONDS,
        f'{documents.num_read:,}',
        num_bytes / _MEGABYTE,
      )
  return sources


def _until_asked(
  documents: text_files.Documents, stop: shutdown.ShutdownRequest | None
) -> Iterator[text_files.Document]:
  """Yields the documents; raises ShutdownError before the next if asked to."""
  for document in documents:
    if stop:
      raise shutdown.ShutdownError(
        f'{stop.name}: stopped after {documents.num_read - 1:,} documents of '
        'the corpus; the same command reads them again and resumes'
      )
    yield document


def _reuse(
  directory: pathlib.Path,
  documents: text_files.Documents,
  tokenizer: tokenizers.Tokenizer,
  modulus: int,
  stop: shutdown.ShutdownRequest | None,
) -> TokenStore:
  store = TokenStore.open(directory)
  sources = SourcesHash()
  for document in _until_asked(documents, stop):
    sources.add(document.id, document.text.encode('utf-8'))
  wanted = {
    'format_version': store_meta.FORMAT_VERSION,
    'tokenizer_fingerprint': tokenizer.fingerprint,
    'sources_fingerprint': sources.hexdigest(),
    'held_out_modulus': modulus,
  }
  _check_identity(store, wanted)
  return store


def _check_identity(store: TokenStore, wanted: Mapping[str, Any]) -> None:
  found = store.meta.identity()
  differences = [
    f'{name}: {found[name]} there, {wanted[name]} wanted'
    for name in wanted
    if found[name] != wanted[name]
  ]
  if differences:
    raise ValueError(
      f'{store.directory} holds another token store ('
      + '; '.join(differences)
      + '): choose another directory or delete it'
    )


def _id_digest(document_id: str) -> bytes:
  # File names may hold bytes that are not UTF-8; Python spells them so.
  data = document_id.encode('utf-8', errors='surrogateescape')
  return hashlib.sha256(data).digest()


def _close_durably(file: BinaryIO) -> None:
  file.flush()
  os.fsync(file.fileno())
  file.close()
