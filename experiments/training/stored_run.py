"""A run as another program finds it: its config and its newest parameters."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax

from experiments import config as config_lib
from experiments.data import token_store
from experiments.data import tokenizers
from experiments.training import checkpoints as checkpoints_lib
from experiments.training import train_step
from experiments.training import workdir as workdir_lib

_PARTS = frozenset(['config', 'corpus', 'tokenizer'])


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredRun:
  """What the newest whole checkpoint of a run, and its config, say.

  Attributes:
    workdir: where the run is.
    config: of the whole run.
    tokenizer: the one it was trained with.
    corpus: fingerprint of the token store that it was trained on.
    step: of the checkpoint.
    params: of the model, at that step.
  """

  workdir: workdir_lib.Workdir
  config: config_lib.TrainLMConfig
  tokenizer: tokenizers.Tokenizer
  corpus: str
  step: int
  params: Any

  @property
  def is_finished(self) -> bool:
    """Whether the checkpoint is that of the run's last step."""
    return self.step == self.config.training.num_steps

  def open_store(self) -> token_store.TokenStore:
    """Returns the token store that the run was trained on.

    Raises:
      ValueError: it is gone, damaged, or holds other documents by now.
    """
    store = token_store.TokenStore.open(
      self.config.data.store or self.workdir.tokens
    )
    if store.fingerprint != self.corpus:
      raise ValueError(
        f'{store.directory} has changed since the training: its fingerprint '
        f'is {store.fingerprint}, was {self.corpus}'
      )
    return store


def _read_identity(workdir: workdir_lib.Workdir) -> dict[str, Any]:
  try:
    identity = json.loads(workdir.config.read_text())
  except FileNotFoundError as error:
    raise ValueError(
      f'{workdir.root} holds no run ({workdir.config.name} is missing): name '
      'the --workdir of a training'
    ) from error
  except ValueError as error:
    raise ValueError(f'{workdir.config} is not JSON: {error}') from error
  if not isinstance(identity, dict) or not _PARTS <= set(identity):
    raise ValueError(f'{workdir.config} does not describe a run')
  return identity


def _load_tokenizer(name: str, fingerprint: str) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.load_tokenizer(name)
  if tokenizer.fingerprint != fingerprint:
    raise ValueError(
      f'the tokenizer {name!r} has changed since the training: its '
      f'fingerprint is {tokenizer.fingerprint}, was {fingerprint}'
    )
  return tokenizer


def load(root: str | os.PathLike[str]) -> StoredRun:
  """Returns the newest whole checkpoint below a run's directory.

  Changes nothing on the disk: the run may be going on.

  Raises:
    ValueError: there is no run, it has no checkpoint yet, or its config or
      tokenizer is not as it was.
    checkpoints.CheckpointsDamagedError: no checkpoint is whole.
  """
  workdir = workdir_lib.Workdir(pathlib.Path(root))
  identity = _read_identity(workdir)
  config = config_lib.from_dict(config_lib.TrainLMConfig, identity['config'])
  tokenizer = _load_tokenizer(config.data.tokenizer, identity['tokenizer'])
  state = jax.eval_shape(lambda: train_step.init_state(config))
  with checkpoints_lib.Checkpoints(
    workdir.checkpoints, config.checkpoint
  ) as checkpoints:
    restored = checkpoints.restore(state)
  if restored is None:
    raise ValueError(f'{workdir.checkpoints} holds no checkpoint yet')
  return StoredRun(
    workdir=workdir,
    config=config,
    tokenizer=tokenizer,
    corpus=identity['corpus'],
    step=restored.step,
    params=restored.state['params'],
  )
