"""Text from a trained model: a run's newest checkpoint, and what it writes."""

from collections.abc import Iterator
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

import deltanet_jax
from experiments import config as config_lib
from experiments.data import tokenizers
from experiments.training import checkpoints as checkpoints_lib
from experiments.training import train_step
from experiments.training import workdir as workdir_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedModel:
  """What generation needs of a run.

  Attributes:
    config: the model's configuration.
    params: its parameters.
    tokenizer: the one it was trained with.
  """

  config: deltanet_jax.ModelConfig
  params: Any
  tokenizer: tokenizers.Tokenizer


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
  if not isinstance(identity, dict) or not {'config', 'tokenizer'} <= set(
    identity
  ):
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


def load(root: str | os.PathLike[str]) -> TrainedModel:
  """Returns the model of the newest whole checkpoint below a run's directory.

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
  return TrainedModel(
    config=config.model, params=restored.state['params'], tokenizer=tokenizer
  )


def continue_text(
  model: TrainedModel,
  prompt: str,
  *,
  num_tokens: int,
  seed: int,
  sampling: deltanet_jax.Sampling,
) -> Iterator[str]:
  """Yields the continuation of a prompt, in pieces of whole characters.

  The model reads BOS and the prompt (BOS alone if that is empty) and writes
  until it draws BOS, the end of a document.

  Args:
    model: what writes.
    prompt: text of any length.
    num_tokens: tokens to write at most.
    seed: of the drawing.
    sampling: how a token is drawn.

  Raises:
    ValueError: an argument breaks a rule of `deltanet_jax.generate`.
  """
  tokenizer = model.tokenizer
  tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prompt)])
  stream = deltanet_jax.generate(
    model.config,
    model.params,
    tokens[None].astype(np.int32),
    num_tokens=num_tokens,
    key=jax.random.key(seed),
    sampling=sampling,
    stop_token=tokenizer.bos_id,
  )
  return _decode((int(token[0]) for token in stream), tokenizer)


def _decode(
  tokens: Iterator[int], tokenizer: tokenizers.Tokenizer
) -> Iterator[str]:
  decoder = tokenizers.StreamingDecoder(tokenizer)
  for token in tokens:
    # BOS ends the text; ids past the vocabulary pad the embedding.
    if token != tokenizer.bos_id and token < tokenizer.vocab_size:
      yield decoder.push([token])
  yield decoder.flush()
