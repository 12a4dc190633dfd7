"""Tokenizers: text to ids and back, exactly.

`ByteTokenizer` needs nothing beyond numpy; `HuggingFaceTokenizer` reads a
`tokenizer.json` through the optional package `tokenizers`.
"""

from collections.abc import Iterable, Sequence
import hashlib
import json
import os
import pathlib
import types
from typing import Protocol

import numpy as np

_BOS_NAMES = ('<|begin_of_text|>', '<bos>', '<s>', '[BOS]', '<|endoftext|>')
_TRAINED_BOS = '<|endoftext|>'
_REPLACEMENT = '\ufffd'


class Tokenizer(Protocol):
  """What the data pipeline and generation ask of a tokenizer.

  Attributes:
    name: how `load_tokenizer` was asked for it, without its directory.
    vocab_size: ids lie in [0, vocab_size).
    bos_id: id written before every document; `encode` never returns it.
    fingerprint: sha256 of everything that defines the mapping.
  """

  name: str
  vocab_size: int
  bos_id: int
  fingerprint: str

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text, int32, without BOS."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids; special ids vanish, broken UTF-8 is U+FFFD."""


class ByteTokenizer:
  """The UTF-8 bytes of the text are its ids; 256 is BOS."""

  name = 'byte'
  vocab_size = 257
  bos_id = 256
  fingerprint = hashlib.sha256(b'utf-8 bytes 0..255, bos 256').hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """Returns the UTF-8 bytes as int32; raises UnicodeError on surrogates."""
    return np.frombuffer(text.encode('utf-8'), np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text; BOS vanishes, broken UTF-8 becomes U+FFFD."""
    ids = _checked_ids(ids, self.vocab_size)
    data = ids[ids != self.bos_id].astype(np.uint8).tobytes()
    return data.decode('utf-8', errors='replace')


class HuggingFaceTokenizer:
  """A `tokenizer.json` file.

  BOS is the first special token of the file among the usual names, otherwise
  an id appended after the vocabulary. Text that spells a special token is
  encoded as ordinary text, so that no document can forge one.

  Raises:
    ValueError: the file is missing or not a tokenizer.
    ImportError: the package `tokenizers` is not installed.
  """

  def __init__(self, path: str | os.PathLike[str]):
    path = pathlib.Path(path)
    if not path.is_file():
      raise ValueError(
        f'no tokenizer file at {path}: give "byte" or the path of a '
        'tokenizer.json'
      )
    data = path.read_bytes()
    self._tokenizer = _parse(data, path)
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    appended = max(vocabulary.values()) + 1
    specials = {
      token.content: index
      for index, token in self._tokenizer.get_added_tokens_decoder().items()
      if token.special
    }
    known = [specials[name] for name in _BOS_NAMES if name in specials]
    self.name = path.name
    self.bos_id = known[0] if known else appended
    self.vocab_size = max(appended, self.bos_id + 1)
    self.fingerprint = hashlib.sha256(data).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids as int32, without any special token."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.array(encoding.ids, np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text; special ids vanish, broken UTF-8 becomes U+FFFD."""
    ids = _checked_ids(ids, self.vocab_size)
    return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def load_tokenizer(name_or_path: str) -> Tokenizer:
  """Returns the tokenizer `byte`, or that of a `tokenizer.json` path."""
  if name_or_path == 'byte':
    return ByteTokenizer()
  return HuggingFaceTokenizer(name_or_path)


class StreamingDecoder:
  """Turns a growing sequence of ids into text, whole characters only.

  The pieces that `push` returns, joined and ended by `flush`, are
  `tokenizer.decode` of all ids.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._ids: list[int] = []
    self._num_emitted = 0  # of self._ids; the earlier ones are context only

  def push(self, ids: Iterable[int]) -> str:
    """Returns the text that became certain with these ids, maybe empty."""
    self._ids.extend(int(i) for i in ids)
    text = self._pending_text()
    if not text or text.endswith(_REPLACEMENT):
      return ''
    self._ids = self._ids[self._num_emitted :]
    self._num_emitted = len(self._ids)
    return text

  def flush(self) -> str:
    """Returns what is left; an incomplete character comes as U+FFFD."""
    text = self._pending_text()
    self._ids, self._num_emitted = [], 0
    return text

  def _pending_text(self) -> str:
    # Decoders may treat the first token differently (leading spaces), hence
    # the last emitted ids are decoded again and their text is cut off.
    context = self._tokenizer.decode(self._ids[: self._num_emitted])
    return self._tokenizer.decode(self._ids)[len(context) :]


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> str:
  """Trains a byte-level BPE and returns its `tokenizer.json` as a string.

  Args:
    texts: the documents to learn the merges from.
    vocab_size: ids in all, the 256 bytes and BOS included.
  """
  if vocab_size < 257:
    raise ValueError(
      f'vocab_size must be at least 257 (256 bytes and BOS), got {vocab_size}'
    )
  library = _import_tokenizers()
  tokenizer = library.Tokenizer(library.models.BPE())
  tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[_TRAINED_BOS],
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer.to_str()


def _import_tokenizers() -> types.ModuleType:
  try:
    import tokenizers
  except ImportError as error:
    raise ImportError(
      'a tokenizer.json needs the package tokenizers: '
      "pip install 'deltanet-jax[data]'"
    ) from error
  return tokenizers


def _parse(data: bytes, path: pathlib.Path):
  try:
    content = json.loads(data)
  except ValueError as error:
    raise ValueError(f'{path} is not a tokenizer.json: {error}') from error
  if not isinstance(content, dict) or 'model' not in content:
    raise ValueError(f'{path} is not a tokenizer.json: it has no "model"')
  return _import_tokenizers().Tokenizer.from_str(data.decode('utf-8'))


def _checked_ids(ids: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
  ids = np.asarray(ids, np.int64)
  wrong = ids[(ids < 0) | (ids >= size)]
  if wrong.size:
    raise ValueError(f'ids must lie in [0, {size}), got {wrong[0]}')
  return ids
