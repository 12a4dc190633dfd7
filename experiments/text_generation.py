"""Text from a trained model: a run's newest checkpoint, and what it writes."""

from collections.abc import Iterator
import dataclasses
import os
from typing import Any

import jax
import numpy as np

import deltanet_jax
from experiments.data import tokenizers
from experiments.training import stored_run


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


def load(root: str | os.PathLike[str]) -> TrainedModel:
  """Returns the model of the newest whole checkpoint below a run's directory.

  Raises:
    ValueError, checkpoints.CheckpointsDamagedError: see `stored_run.load`.
  """
  run = stored_run.load(root)
  return TrainedModel(
    config=run.config.model, params=run.params, tokenizer=run.tokenizer
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
