import dataclasses

import pytest

from experiments import config
from experiments.data import preparation
from experiments.data import token_store
from experiments.data import tokenizers


@pytest.fixture
def data_config(tmp_path):
  (tmp_path / 'corpus').mkdir()
  for i in range(8):
    (tmp_path / 'corpus' / f'{i}.txt').write_text(f'text {i}')
  return config.DataConfig(
    files=(str(tmp_path / 'corpus' / '*.txt'),), held_out_modulus=3
  )


def test_files_are_written_once_below_the_workdir(tmp_path, data_config):
  store = preparation.prepare_store(data_config, tmp_path / 'run')
  assert store.directory == tmp_path / 'run' / 'tokens'
  assert store.fingerprint == (
    preparation.prepare_store(data_config, tmp_path / 'run').fingerprint
  )


def test_changed_files_are_refused_in_the_same_workdir(tmp_path, data_config):
  preparation.prepare_store(data_config, tmp_path / 'run')
  (tmp_path / 'corpus' / '0.txt').write_text('changed')
  with pytest.raises(ValueError, match='another token store'):
    preparation.prepare_store(data_config, tmp_path / 'run')


def test_a_named_store_is_opened(tmp_path, data_config):
  written = preparation.prepare_store(data_config, tmp_path / 'run')
  opened = preparation.prepare_store(
    config.DataConfig(store=str(written.directory)), tmp_path / 'other'
  )
  assert opened == written
  assert not (tmp_path / 'other').exists()


def test_a_store_of_another_tokenizer_is_refused(tmp_path, data_config):
  store = preparation.prepare_store(data_config, tmp_path / 'run')
  path = tmp_path / 'tokenizer.json'
  path.write_text(tokenizers.train_byte_level_bpe(['a b c'], 260))
  other = config.DataConfig(store=str(store.directory), tokenizer=str(path))
  with pytest.raises(ValueError, match="tokenizer 'byte'.*'tokenizer.json'"):
    preparation.prepare_store(other, tmp_path)


def test_a_missing_store_is_refused(tmp_path):
  with pytest.raises(ValueError, match='no token store'):
    preparation.prepare_store(
      config.DataConfig(store=str(tmp_path / 'none')), tmp_path
    )


def test_no_files_mean_the_default_corpus(tmp_path, monkeypatch, data_config):
  files = preparation.read_documents(data_config).files
  monkeypatch.setattr(preparation.corpus, 'default_files', lambda: files)
  store = preparation.prepare_store(
    config.DataConfig(held_out_modulus=3), tmp_path / 'run'
  )
  assert sum(s.num_documents for s in store.meta.splits.values()) == 8


def test_bpe_store_gives_the_text_back(tmp_path, data_config):
  path = tmp_path / 'tokenizer.json'
  path.write_text(tokenizers.train_byte_level_bpe(['text ' * 9], 260))
  bpe_config = config.DataConfig(
    files=data_config.files, tokenizer=str(path), held_out_modulus=3
  )
  store = preparation.prepare_store(bpe_config, tmp_path / 'run')
  tokenizer = tokenizers.load_tokenizer(str(path))
  found = [
    tokenizer.decode(split.document(i))
    for split in map(store.split, token_store.store_meta.SPLITS)
    for i in range(split.num_documents)
  ]
  assert sorted(found) == [f'text {i}' for i in range(8)]


def test_a_split_without_documents_is_named(tmp_path, data_config, caplog):
  changed = dataclasses.replace(data_config, held_out_modulus=10**9)
  with caplog.at_level('WARNING'):
    preparation.prepare_store(changed, tmp_path / 'run')
  assert caplog.messages == [
    "No document is in the split 'validation'",
    "No document is in the split 'test'",
  ]
