import collections
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from experiments.data import store_meta
from experiments.data import text_files
from experiments.data import token_store
from experiments.data import tokenizers
from experiments.training import shutdown

TOKENIZER = tokenizers.ByteTokenizer()


@pytest.fixture
def corpus(tmp_path):
  directory = tmp_path / 'corpus'
  directory.mkdir()
  for i in range(12):
    (directory / f'{i:02}.txt').write_text(f'text é {i}' * (i + 1))
  return directory


def documents(corpus, max_bad_fraction=0.5):
  return text_files.Documents(
    text_files.find_files([str(corpus / '*')]),
    max_bad_fraction=max_bad_fraction,
  )


def write(directory, corpus, tokenizer=TOKENIZER, modulus=3, stop=None):
  return token_store.write_store(
    directory,
    documents(corpus),
    tokenizer,
    held_out_modulus=modulus,
    stop=stop,
  )


def texts(split):
  return [
    TOKENIZER.decode(split.document(i)) for i in range(split.num_documents)
  ]


def test_every_document_is_bos_and_its_tokens(tmp_path, corpus):
  store = write(tmp_path / 'store', corpus)
  expected = {'validation': [], 'test': [], 'train': []}
  for path in sorted(corpus.iterdir()):
    digest = hashlib.sha256(path.name.encode()).hexdigest()
    name = list(expected)[int(digest, 16) % 3]
    expected[name].append(path.read_text())
  assert all(expected.values())
  for name, wanted in expected.items():
    split = token_store.TokenStore.open(store.directory).split(name)
    assert texts(split) == wanted
    assert split.num_bytes == sum(len(t.encode()) for t in wanted)
    assert split.tokens.dtype == '<u2'
    assert (split.tokens[split.offsets[:-1]] == TOKENIZER.bos_id).all()
    assert len(split.tokens) == split.num_bytes + len(wanted)
    assert split.offsets.dtype == np.int64
  store.verify()


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path, corpus):
  class LargeTokenizer(tokenizers.ByteTokenizer):
    vocab_size = 65_537
    bos_id = 65_536

  store = write(tmp_path / 'store', corpus, LargeTokenizer())
  tokens = store.split('train').tokens
  assert tokens.dtype == '<u4'
  assert tokens[0] == 65_536


def test_bad_documents_are_recorded(tmp_path, corpus):
  (corpus / 'bad.txt').write_bytes(b'\xff')
  store = write(tmp_path / 'store', corpus)
  assert store.meta.bad_counts == {'invalid UTF-8': 1}
  assert '1 skipped (1 invalid UTF-8)' in store.summary()


def test_fingerprint_changes_with_a_byte_a_name_and_the_split(tmp_path, corpus):
  fingerprints = [write(tmp_path / 'a', corpus).fingerprint]
  fingerprints.append(write(tmp_path / 'b', corpus, modulus=4).fingerprint)
  path = corpus / '05.txt'
  path.write_text(path.read_text()[:-1] + '!')
  fingerprints.append(write(tmp_path / 'c', corpus).fingerprint)
  path.rename(corpus / '055.txt')
  fingerprints.append(write(tmp_path / 'd', corpus).fingerprint)
  assert len(set(fingerprints)) == 4


def test_moved_sources_give_the_same_fingerprint(tmp_path, corpus):
  one = write(tmp_path / 'a', corpus)
  corpus.rename(tmp_path / 'moved')
  two = write(tmp_path / 'b', tmp_path / 'moved')
  assert one.fingerprint == two.fingerprint


def test_an_equal_store_is_reused(tmp_path, corpus):
  write(tmp_path / 'store', corpus)
  before = (tmp_path / 'store' / 'meta.json').stat().st_mtime_ns
  write(tmp_path / 'store', corpus)
  assert (tmp_path / 'store' / 'meta.json').stat().st_mtime_ns == before


@pytest.mark.parametrize('change', ['text', 'modulus', 'tokenizer'])
def test_a_different_store_is_never_overwritten(tmp_path, corpus, change):
  class OtherTokenizer(tokenizers.ByteTokenizer):
    fingerprint = 'other'

  store = write(tmp_path / 'store', corpus)
  modulus, tokenizer = 3, TOKENIZER
  if change == 'text':
    (corpus / '03.txt').write_text('changed')
    named = 'sources_fingerprint'
  elif change == 'modulus':
    modulus, named = 4, 'held_out_modulus: 3 there, 4 wanted'
  else:
    tokenizer, named = OtherTokenizer(), 'tokenizer_fingerprint'
  with pytest.raises(ValueError, match=named):
    write(tmp_path / 'store', corpus, tokenizer, modulus)
  store.verify()


def test_foreign_files_are_never_touched(tmp_path, corpus):
  (tmp_path / 'store').mkdir()
  write(tmp_path / 'store', corpus)  # an empty directory is taken
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes').write_text('mine')
  with pytest.raises(ValueError, match='holds other files'):
    write(tmp_path / 'mine', corpus)
  assert os.listdir(tmp_path / 'mine') == ['notes']


def test_a_failed_write_leaves_nothing(tmp_path, corpus):
  class FailingTokenizer(tokenizers.ByteTokenizer):
    def encode(self, text):
      if 'text é 7' in text:
        raise OSError('disk full')
      return super().encode(text)

  with pytest.raises(OSError, match='disk full'):
    write(tmp_path / 'store', corpus, FailingTokenizer())
  assert os.listdir(tmp_path) == ['corpus']


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_writing_at_the_next_document(
  tmp_path, corpus, number
):
  encoded = []

  class SignalledTokenizer(tokenizers.ByteTokenizer):
    def encode(self, text):
      encoded.append(text)
      if 'text é 7' in text:
        os.kill(os.getpid(), number)
      return super().encode(text)

  with shutdown.requested() as stop:
    with pytest.raises(
      shutdown.ShutdownError, match=f'{number.name}: stopped after 8 documents'
    ):
      write(tmp_path / 'store', corpus, SignalledTokenizer(), stop=stop)
  assert len(encoded) == 8
  assert os.listdir(tmp_path) == ['corpus']
  write(tmp_path / 'store', corpus).verify()


def test_a_signal_ends_the_comparison_with_a_store(tmp_path, corpus):
  store = write(tmp_path / 'store', corpus)
  with shutdown.requested() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(shutdown.ShutdownError, match='after 0 documents'):
      write(tmp_path / 'store', corpus, stop=stop)
  store.verify()


def test_too_many_bad_documents_leave_nothing(tmp_path, corpus):
  (corpus / 'bad.txt').write_bytes(b'\xff')
  with pytest.raises(text_files.BadDocumentsError):
    token_store.write_store(
      tmp_path / 'store',
      documents(corpus, max_bad_fraction=0.01),
      TOKENIZER,
      held_out_modulus=3,
    )
  assert os.listdir(tmp_path) == ['corpus']


KILLED_WRITER = """
import os, signal, sys
from experiments.data import text_files, token_store, tokenizers

class Tokenizer(tokenizers.ByteTokenizer):
  def encode(self, text):
    if 'text é 7' in text:
      os.kill(os.getpid(), signal.SIGKILL)
    return super().encode(text)

documents = text_files.Documents(text_files.find_files([sys.argv[1]]))
token_store.write_store(
  sys.argv[2], documents, Tokenizer(), held_out_modulus=3
)
"""


def test_a_killed_write_leaves_no_store(tmp_path, corpus):
  target = tmp_path / 'store'
  command = [sys.executable, '-c', KILLED_WRITER, str(corpus / '*'), target]
  root = pathlib.Path(token_store.__file__).parents[2]
  killed = subprocess.run(command, cwd=root, check=False)
  assert killed.returncode == -signal.SIGKILL
  with pytest.raises(ValueError, match='no token store'):
    token_store.TokenStore.open(target)
  write(target, corpus).verify()


def test_a_store_finished_meanwhile_is_reused(tmp_path, corpus):
  class RacingTokenizer(tokenizers.ByteTokenizer):
    def encode(self, text):
      if not (tmp_path / 'store').exists():
        write(tmp_path / 'store', corpus)
      return super().encode(text)

  write(tmp_path / 'store', corpus, RacingTokenizer()).verify()
  assert sorted(os.listdir(tmp_path)) == ['corpus', 'store']


@pytest.mark.parametrize('name', ['train/tokens.bin', 'test/tokens.bin'])
def test_a_flipped_bit_fails_verification(tmp_path, corpus, name):
  store = write(tmp_path / 'store', corpus)
  path = store.directory / name
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  with pytest.raises(ValueError, match=f'{name} is damaged'):
    token_store.TokenStore.open(store.directory).verify()


@pytest.mark.parametrize(
  'name', ['train/tokens.bin', 'train/offsets.npy', 'meta.json']
)
@pytest.mark.parametrize('damage', ['truncate', 'delete'])
def test_a_damaged_store_does_not_open(tmp_path, corpus, name, damage):
  store = write(tmp_path / 'store', corpus)
  path = store.directory / name
  if damage == 'truncate':
    os.truncate(path, path.stat().st_size - 8)
  else:
    path.unlink()
  with pytest.raises(ValueError, match='store'):
    token_store.TokenStore.open(store.directory)


def test_the_format_of_two_splits_does_not_open(tmp_path, corpus):
  store = write(tmp_path / 'store', corpus)
  path = store.directory / 'meta.json'
  content = json.loads(path.read_text()) | {'format_version': 1}
  content['splits']['held_out'] = content['splits'].pop('test')
  path.write_text(json.dumps(content))
  with pytest.raises(ValueError, match='format 1, not 2.* write it again'):
    token_store.TokenStore.open(store.directory)
  with pytest.raises(ValueError, match='format 1, not 2.* write it again'):
    write(store.directory, corpus)


def test_a_store_without_training_text_is_refused(tmp_path, corpus):
  with pytest.raises(ValueError, match='none of 12 documents'):
    write(tmp_path / 'store', corpus, modulus=1)
  assert not (tmp_path / 'store').exists()


@pytest.mark.parametrize('name', ['validation', 'test'])
def test_an_empty_split_opens(tmp_path, corpus, name):
  split = write(tmp_path / 'store', corpus, modulus=10**9).split(name)
  assert (split.num_documents, split.num_bytes, len(split.tokens)) == (0, 0, 0)


def test_validation_and_test_are_each_about_one_document_in_the_modulus():
  names = collections.Counter(
    token_store.split_of(f'{i}.txt', 50) for i in range(50_000)
  )
  assert names.keys() == set(store_meta.SPLITS)
  for name in ('validation', 'test'):
    assert 900 < names[name] < 1100


def test_wrong_arguments_are_refused(tmp_path, corpus):
  with pytest.raises(ValueError, match='held_out_modulus .* got 0'):
    write(tmp_path / 'store', corpus, modulus=0)
  with pytest.raises(ValueError, match="got 'held_out'"):
    write(tmp_path / 'store', corpus).split('held_out')
