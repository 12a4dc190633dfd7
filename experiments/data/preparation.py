"""From a data config to an opened token store."""

import os
import pathlib

from absl import logging

from experiments import config
from experiments.data import corpus
from experiments.data import text_files
from experiments.data import token_store
from experiments.data import tokenizers
from experiments.training import shutdown


def read_documents(data_config: config.DataConfig) -> text_files.Documents:
  """Returns the documents of `files`, or of the default corpus if empty."""
  if data_config.files:
    files = text_files.find_files(data_config.files)
  else:
    files = corpus.default_files()
  return text_files.Documents(
    files,
    text_field=data_config.text_field,
    max_bad_fraction=data_config.max_bad_fraction,
  )


def prepare_store(
  data_config: config.DataConfig,
  workdir: str | os.PathLike[str],
  *,
  stop: shutdown.ShutdownRequest | None = None,
) -> token_store.TokenStore:
  """Opens the store of the config, or builds it under `workdir`/tokens.

  A store named by `data.store` keeps the splits it was written with.

  Raises:
    ValueError: the store is missing, damaged, of another tokenizer, or
      `workdir` holds one of other documents.
    shutdown.ShutdownError: asked to stop; no store is left unfinished.
  """
  tokenizer = tokenizers.load_tokenizer(data_config.tokenizer)
  if data_config.store:
    store = token_store.TokenStore.open(data_config.store)
    _check_tokenizer(store, tokenizer)
  else:
    store = write_documents(
      data_config, tokenizer, pathlib.Path(workdir, 'tokens'), stop=stop
    )
  logging.info('%s', store.summary())
  for name, split in store.meta.splits.items():
    if not split.num_documents:
      logging.warning('No document is in the split %r', name)
  return store


def open_store(
  data_config: config.DataConfig, workdir: str | os.PathLike[str]
) -> token_store.TokenStore:
  """Opens the store that `prepare_store` opened or built, reading no document.

  Raises:
    ValueError: the store is missing or damaged.
  """
  return token_store.TokenStore.open(
    data_config.store or pathlib.Path(workdir, 'tokens')
  )


def write_documents(
  data_config: config.DataConfig,
  tokenizer: tokenizers.Tokenizer,
  directory: str | os.PathLike[str],
  *,
  stop: shutdown.ShutdownRequest | None = None,
) -> token_store.TokenStore:
  """Writes, or reuses, the store of a config's documents; names bad ones.

  Raises:
    ValueError, text_files.BadDocumentsError, shutdown.ShutdownError: see
      `token_store.write_store`.
  """
  documents = read_documents(data_config)
  store = token_store.write_store(
    directory,
    documents,
    tokenizer,
    held_out_modulus=data_config.held_out_modulus,
    stop=stop,
  )
  for line in documents.first_bad:
    logging.warning('Skipped %s', line)
  return store


def _check_tokenizer(
  store: token_store.TokenStore, tokenizer: tokenizers.Tokenizer
) -> None:
  if store.meta.tokenizer_fingerprint != tokenizer.fingerprint:
    raise ValueError(
      f'the store {store.directory} was written with the tokenizer '
      f'{store.meta.tokenizer!r} of fingerprint '
      f'{store.meta.tokenizer_fingerprint}, not with {tokenizer.name!r} of '
      f'{tokenizer.fingerprint}: set data.tokenizer to that of the store'
    )
