"""The meta.json of a token store, and the digests it records."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

FILE_NAME = 'meta.json'
# By the remainder of a document's hash: 0, 1, all others. What is tuned reads
# `validation`; `test`, the held-out text, is read by a run's report alone.
SPLITS = ('validation', 'test', 'train')
FORMAT_VERSION = 2
REBUILD = 'delete the store and write it again'

_HASHED_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitMeta:
  """Sizes of a split, and blake2b digests of its files."""

  num_documents: int
  num_tokens: int
  num_bytes: int
  tokens_digest: str
  offsets_digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreMeta:
  """The content of meta.json.

  Attributes:
    format_version: layout of the directory.
    dtype: of tokens.bin.
    vocab_size: of the tokenizer.
    tokenizer: its name.
    tokenizer_fingerprint: see `experiments.data.tokenizers`.
    sources_fingerprint: see `token_store.SourcesHash`.
    held_out_modulus: see `token_store.split_of`.
    bad_counts: skipped documents by reason.
    splits: by name, one of `SPLITS`.
  """

  format_version: int
  dtype: str
  vocab_size: int
  tokenizer: str
  tokenizer_fingerprint: str
  sources_fingerprint: str
  held_out_modulus: int
  bad_counts: Mapping[str, int]
  splits: Mapping[str, SplitMeta]

  def identity(self) -> dict[str, Any]:
    """Returns what decides whether two stores hold the same tokens."""
    return {
      name: getattr(self, name)
      for name in (
        'format_version',
        'tokenizer_fingerprint',
        'sources_fingerprint',
        'held_out_modulus',
      )
    }


def read(directory: pathlib.Path) -> StoreMeta:
  """Reads meta.json.

  Raises:
    ValueError: it is missing, unreadable or of another format.
  """
  path = directory / FILE_NAME
  if not path.is_file():
    raise ValueError(
      f'{directory} is no token store (no {FILE_NAME}): write one with '
      '`python -m experiments.tokenize_text`'
    )
  try:
    content = json.loads(path.read_bytes())
    version = content['format_version']
    if version != FORMAT_VERSION:
      raise ValueError(f'format {version}, not {FORMAT_VERSION}')
    splits = {name: SplitMeta(**content['splits'][name]) for name in SPLITS}
    return StoreMeta(**(content | {'splits': splits}))
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} is unreadable ({error}): {REBUILD}') from error


def new_digest() -> hashlib.blake2b:
  """Returns an empty digest."""
  return hashlib.blake2b(digest_size=32)


def file_digest(path: pathlib.Path) -> str:
  """Returns the digest of a file, as hex."""
  digest = new_digest()
  with path.open('rb') as file:
    while block := file.read(_HASHED_BYTES):
      digest.update(block)
  return digest.hexdigest()
