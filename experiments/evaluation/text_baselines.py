"""What simple models and compressors achieve on the held-out text."""

from collections.abc import Iterator
import lzma
import zlib

import numpy as np

from experiments.data import token_store
from experiments.data import tokenizers

_TRAIN_BYTES = 1 << 26  # more would not change the counts that matter
_CHUNK_BYTES = 1 << 22
_SYMBOLS = 256


class TrigramModel:
  """A byte model of order 2, interpolated after Witten and Bell.

    p_k(c | h) = (n(h c) + t(h) p_{k-1}(c | h')) / (n(h) + t(h))

  for contexts h of k = 2, 1, 0 bytes, where n counts occurrences, t(h) counts
  the distinct bytes seen after h, h' is h without its oldest byte, and
  p_{-1} = 1/256. For an unseen h, p_k = p_{k-1}. The text is preceded by two
  zero bytes.
  """

  def __init__(self, text: bytes):
    """Counts the trigrams of the text."""
    counts = np.zeros(_SYMBOLS**3, np.int64)
    for trigrams in _trigram_chunks(text):
      counts += np.bincount(trigrams, minlength=len(counts))
    counts = counts.reshape((_SYMBOLS,) * 3)
    orders = (
      counts.sum((0, 1))[None],
      counts.sum(0),
      counts.reshape(-1, _SYMBOLS),
    )
    self._orders = [
      (table, table.sum(1), np.count_nonzero(table, axis=1)) for table in orders
    ]

  def probabilities(
    self, contexts: np.ndarray, symbols: np.ndarray
  ) -> np.ndarray:
    """Returns p(symbol | context), float64  # [N].

    Args:
      contexts: the two bytes before each symbol, older * 256 + newer.  # [N]
      symbols: bytes.  # [N]
    """
    histories = (np.zeros_like(contexts), contexts % _SYMBOLS, contexts)
    result = np.full(len(symbols), 1 / _SYMBOLS)
    for (counts, totals, distinct), history in zip(
      self._orders, histories, strict=True
    ):
      total, kinds = totals[history], distinct[history]
      mixed = (counts[history, symbols] + kinds * result) / np.maximum(
        total + kinds, 1
      )
      result = np.where(total > 0, mixed, result)
    return result

  def bits(self, text: bytes) -> float:
    """Returns the code length of a text, in bits."""
    bits = 0.0
    for trigrams in _trigram_chunks(text):
      contexts, symbols = np.divmod(trigrams, _SYMBOLS)
      bits -= float(np.log2(self.probabilities(contexts, symbols)).sum())
    return bits


def measure(
  train_split: token_store.Split,
  test_split: token_store.Split,
  tokenizer: tokenizers.Tokenizer,
) -> dict[str, float]:
  """Returns bits per byte on the held-out test text, its documents joined.

  `order_2` is a `TrigramModel` of the first 64 MiB of the training text; `zlib`
  (level 9) and `xz` (preset 9, extreme) see the held-out text alone.

  Raises:
    ValueError: nothing is held out, or the tokenizer does not give the text
      back exactly.
  """
  text = b''.join(_texts(test_split, tokenizer))
  if not text:
    raise ValueError('no text is in the test split: lower held_out_modulus')
  if len(text) != test_split.num_bytes:
    raise ValueError(
      f'the tokenizer {tokenizer.name!r} gives {len(text)} bytes of '
      f'{test_split.num_bytes} back: bits per byte need an exact one'
    )
  model = TrigramModel(_head(_texts(train_split, tokenizer), _TRAIN_BYTES))
  xz = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
  return {
    'order_2': model.bits(text) / len(text),
    'zlib': 8 * len(zlib.compress(text, 9)) / len(text),
    'xz': 8 * len(xz) / len(text),
  }


def _texts(
  split: token_store.Split, tokenizer: tokenizers.Tokenizer
) -> Iterator[bytes]:
  for index in range(split.num_documents):
    yield tokenizer.decode(split.document(index)).encode('utf-8')


def _head(texts: Iterator[bytes], size: int) -> bytes:
  head = bytearray()
  for text in texts:
    head += text
    if len(head) >= size:
      break
  return bytes(head[:size])


def _trigram_chunks(text: bytes) -> Iterator[np.ndarray]:
  """Yields (a * 256 + b) * 256 + c of each byte c and the two before it."""
  codes = np.frombuffer(bytes(2) + text, np.uint8)
  for start in range(0, len(text), _CHUNK_BYTES):
    chunk = codes[start : start + _CHUNK_BYTES + 2].astype(np.int64)
    yield (chunk[:-2] * _SYMBOLS + chunk[1:-1]) * _SYMBOLS + chunk[2:]
