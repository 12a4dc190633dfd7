import lzma
import math
import random
import zlib

import numpy as np
import pytest

from experiments.data import text_files
from experiments.data import token_store
from experiments.data import tokenizers
from experiments.evaluation import text_baselines


def contexts(*pairs):
  return np.array([pair[0] * 256 + pair[1] for pair in pairs])


@pytest.mark.parametrize(
  'context', [b'\0\0', b'ab', b'zb', b'zz'], ids=['start', '2', '1', '0']
)
def test_probabilities_sum_to_one(context):
  model = text_baselines.TrigramModel(b'abracadabra' * 3)
  p = model.probabilities(contexts(*[context] * 256), np.arange(256))
  assert (p > 0).all()
  assert p.sum() == pytest.approx(1, abs=1e-12)


def test_probabilities_by_hand():
  model = text_baselines.TrigramModel(b'abab')  # after two zero bytes
  # Order 0: 2 a, 2 b of 2 kinds.      p0(a) = (2 + 2/256) / 6
  # Order 1 after b: 1 a of 1 kind.    p1(a|b) = (1 + p0) / 2
  # Order 2 after ab: 1 a of 1 kind.   p2(a|ab) = (1 + p1) / 2
  p0 = (2 + 2 / 256) / 6
  p1 = (1 + p0) / 2
  p2 = (1 + p1) / 2
  found = model.probabilities(
    contexts(b'zz', b'zb', b'ab'), np.frombuffer(b'aaa', np.uint8)
  )
  np.testing.assert_allclose(found, [p0, p1, p2], rtol=1e-12)


def test_bits_are_the_sum_over_the_bytes():
  model = text_baselines.TrigramModel(b'abab')
  p = model.probabilities(
    contexts(b'\0\0', b'\0a', b'ac'), np.frombuffer(b'acb', np.uint8)
  )
  assert model.bits(b'acb') == pytest.approx(-np.log2(p).sum(), rel=1e-12)


def test_an_untrained_model_needs_eight_bits():
  assert text_baselines.TrigramModel(b'').bits(b'any') == pytest.approx(24)


def test_chunks_do_not_change_counts_or_bits(monkeypatch):
  text = random.Random(0).randbytes(1000)
  whole = text_baselines.TrigramModel(text).bits(text[:99])
  monkeypatch.setattr(text_baselines, '_CHUNK_BYTES', 137)
  cut = text_baselines.TrigramModel(text).bits(text[:99])
  assert cut == pytest.approx(whole, rel=1e-12)


def make_store(tmp_path, texts, modulus):
  corpus = tmp_path / 'corpus'
  corpus.mkdir()
  for i, text in enumerate(texts):
    (corpus / f'{i}.txt').write_text(text)
  documents = text_files.Documents(text_files.find_files([f'{corpus}/*']))
  return token_store.write_store(
    tmp_path / 'store',
    documents,
    tokenizers.ByteTokenizer(),
    held_out_modulus=modulus,
  )


TEXTS = [f'the snake naïve {i} eats {i * i} eggs\n' * 5 for i in range(9)]


def test_measures_exactly_the_test_text(tmp_path):
  store = make_store(tmp_path, TEXTS, 3)
  train, test = (
    ''.join(
      text
      for i, text in enumerate(TEXTS)
      if token_store.split_of(f'{i}.txt', 3) == wanted
    ).encode()
    for wanted in ('train', 'test')
  )
  found = text_baselines.measure(
    store.split('train'), store.split('test'), tokenizers.ByteTokenizer()
  )
  size = len(test)
  xz = lzma.compress(test, preset=9 | lzma.PRESET_EXTREME)
  model = text_baselines.TrigramModel(train)
  assert found == {
    'order_2': model.bits(test) / size,
    'zlib': 8 * len(zlib.compress(test, 9)) / size,
    'xz': 8 * len(xz) / size,
  }
  assert all(math.isfinite(value) for value in found.values())
  assert found['order_2'] < 8


def test_an_empty_test_split_is_refused(tmp_path):
  store = make_store(tmp_path, TEXTS, 10**9)
  with pytest.raises(ValueError, match='no text is in the test split'):
    text_baselines.measure(
      store.split('train'), store.split('test'), tokenizers.ByteTokenizer()
    )


def test_a_lossy_tokenizer_is_refused(tmp_path):
  class LossyTokenizer(tokenizers.ByteTokenizer):
    def decode(self, ids):
      return super().decode(ids).replace('snake', 'eel')

  store = make_store(tmp_path, TEXTS, 3)
  with pytest.raises(ValueError, match='bits per byte need an exact one'):
    text_baselines.measure(
      store.split('train'), store.split('test'), LossyTokenizer()
    )
