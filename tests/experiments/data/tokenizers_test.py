import hashlib
import json
import sys

import numpy as np
import pytest

from experiments.data import tokenizers

TEXT = 'def f(x):\r\n\treturn "naïve ☃ 🐍" * x  # <|endoftext|>\n' * 20


@pytest.fixture(scope='module')
def bpe_path(tmp_path_factory):
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  path.write_text(tokenizers.train_byte_level_bpe([TEXT], 280))
  return path


@pytest.fixture(params=['byte', 'bpe'])
def tokenizer(request, bpe_path):
  name = 'byte' if request.param == 'byte' else str(bpe_path)
  return tokenizers.load_tokenizer(name)


def test_byte_ids_are_the_utf8_bytes():
  tokenizer = tokenizers.ByteTokenizer()
  np.testing.assert_array_equal(tokenizer.encode('aé'), [97, 0xC3, 0xA9])
  assert (tokenizer.vocab_size, tokenizer.bos_id) == (257, 256)


def test_round_trip_is_exact(tokenizer):
  every_character = ''.join(
    chr(c) for c in [*range(0xD800), *range(0xE000, 0x11000)]
  )
  for text in ('', 'a', TEXT, ' leading', 'trailing ', every_character):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


def test_encode_never_returns_bos(tokenizer):
  assert tokenizer.bos_id not in tokenizer.encode(TEXT)
  assert tokenizer.bos_id < tokenizer.vocab_size


def test_decode_drops_bos(tokenizer):
  ids = [tokenizer.bos_id, *tokenizer.encode('ab'), tokenizer.bos_id]
  assert tokenizer.decode(ids) == 'ab'


def test_decode_refuses_ids_outside_the_vocabulary(tokenizer):
  for wrong in (-1, tokenizer.vocab_size):
    with pytest.raises(ValueError, match=f'got {wrong}'):
      tokenizer.decode([0, wrong])


def test_byte_decode_replaces_broken_characters():
  assert tokenizers.ByteTokenizer().decode([97, 0xC3, 98]) == 'a\ufffdb'


@pytest.mark.parametrize('chunk', [1, 2, 7])
def test_streaming_emits_whole_characters_only(tokenizer, chunk):
  ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
  decoder = tokenizers.StreamingDecoder(tokenizer)
  pieces = [decoder.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
  assert not any('\ufffd' in piece for piece in pieces)
  assert ''.join(pieces) + decoder.flush() == TEXT
  assert sum(map(bool, pieces)) > len(ids) // chunk // 2


def test_streaming_equals_decode_on_broken_bytes():
  tokenizer = tokenizers.ByteTokenizer()
  ids = np.random.default_rng(0).integers(0, 257, 500)
  decoder = tokenizers.StreamingDecoder(tokenizer)
  text = ''.join(decoder.push([i]) for i in ids) + decoder.flush()
  assert text == tokenizer.decode(ids)


def test_streaming_flush_reports_an_unfinished_character():
  decoder = tokenizers.StreamingDecoder(tokenizers.ByteTokenizer())
  assert decoder.push([97, 0xE2, 0x98]) == ''
  assert decoder.flush() == 'a\ufffd'
  assert decoder.push([98]) == 'b'


def test_bpe_uses_the_existing_special_token_as_bos(bpe_path):
  tokenizer = tokenizers.load_tokenizer(str(bpe_path))
  content = json.loads(bpe_path.read_text())
  assert tokenizer.bos_id == content['added_tokens'][0]['id']
  assert tokenizer.vocab_size == 280
  assert len(tokenizer.encode(TEXT)) < len(TEXT.encode())


def test_bos_is_appended_where_the_file_has_none(bpe_path, tmp_path):
  content = json.loads(bpe_path.read_text())
  content['added_tokens'] = []
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(content))
  tokenizer = tokenizers.load_tokenizer(str(path))
  assert (tokenizer.bos_id, tokenizer.vocab_size) == (280, 281)
  assert tokenizer.decode([*tokenizer.encode('ab'), 280]) == 'ab'


def test_truncation_and_padding_of_the_file_are_ignored(bpe_path, tmp_path):
  content = json.loads(bpe_path.read_text())
  content['truncation'] = {
    'direction': 'Right',
    'max_length': 4,
    'strategy': 'LongestFirst',
    'stride': 0,
  }
  path = tmp_path / 'tokenizer.json'
  path.write_text(json.dumps(content))
  tokenizer = tokenizers.load_tokenizer(str(path))
  assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_fingerprint_changes_with_the_file(bpe_path, tmp_path):
  data = bpe_path.read_bytes()
  tokenizer = tokenizers.load_tokenizer(str(bpe_path))
  assert tokenizer.fingerprint == hashlib.sha256(data).hexdigest()
  other = tmp_path / 'tokenizer.json'
  other.write_bytes(data + b'\n')
  assert (
    tokenizers.load_tokenizer(str(other)).fingerprint != tokenizer.fingerprint
  )
  assert tokenizers.ByteTokenizer().fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize('content', [None, '{"a"', '[]', '\xff'])
def test_a_wrong_file_is_refused(tmp_path, content):
  path = tmp_path / 'tokenizer.json'
  if content is not None:
    path.write_text(content, encoding='latin-1')
  with pytest.raises(ValueError, match='tokenizer.json'):
    tokenizers.load_tokenizer(str(path))


def test_a_missing_package_is_named(bpe_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(ImportError, match=r"pip install 'deltanet-jax\[data\]'"):
    tokenizers.load_tokenizer(str(bpe_path))


def test_a_vocabulary_below_the_bytes_is_refused():
  with pytest.raises(ValueError, match='at least 257.*got 256'):
    tokenizers.train_byte_level_bpe([TEXT], 256)
