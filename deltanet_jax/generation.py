"""Text generation: chunked prefill, then one jitted step per token.

The cache has a constant size (`attention` reserves it beforehand), so a step
costs the same at any position.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax import config as config_lib
from deltanet_jax import language_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How a token is drawn from the logits.

  Attributes:
    temperature: the logits are divided by it.
    top_k: only the k most likely tokens are drawn; 0: all.
    top_p: only the most likely tokens whose probabilities reach this sum are
      drawn, after `temperature` and `top_k`; always at least one.
    greedy: take the most likely token; the rest must be at its default.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  greedy: bool = False

  def __post_init__(self):
    if not (self.temperature > 0 and math.isfinite(self.temperature)):
      raise ValueError(
        f'temperature must be finite and above 0, got {self.temperature}; '
        'use greedy=True for the most likely token'
      )
    if self.top_k < 0:
      raise ValueError(f'top_k must be at least 0, got {self.top_k}')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p must lie in (0, 1], got {self.top_p}')
    drawn = (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0)
    if self.greedy and drawn:
      raise ValueError(
        f'greedy=True excludes temperature, top_k and top_p, got {self}'
      )


_DEFAULT_SAMPLING = Sampling()


def sample(
  logits: jax.Array, key: jax.Array, sampling: Sampling = _DEFAULT_SAMPLING
) -> jax.Array:
  """Draws a token for every row of logits [B, vocab].

  Returns:
    int32 [B].
  """
  if sampling.greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  vocab = logits.shape[-1]
  if not sampling.top_k and sampling.top_p == 1:
    return jax.random.categorical(key, logits).astype(jnp.int32)
  best, tokens = jax.lax.top_k(logits, min(sampling.top_k or vocab, vocab))
  if sampling.top_p < 1:
    probabilities = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    best = jnp.where(before < sampling.top_p, best, -jnp.inf)
  rank = jax.random.categorical(key, best)
  return jnp.take_along_axis(tokens, rank[:, None], axis=-1)[:, 0]


def generate(
  config: config_lib.ModelConfig,
  params: language_model.Params,
  prompt_tokens: Any,
  *,
  num_tokens: int,
  key: jax.Array,
  sampling: Sampling = _DEFAULT_SAMPLING,
  prefill_chunk: int = 256,
  stop_token: int | None = None,
) -> Iterator[jax.Array]:
  """Continues prompts, yielding the tokens of one position at a time.

  The token at position p of the sequence is drawn with `fold_in(key, p)`: the
  same key gives the same text whatever the chunk of the prefill.

  Args:
    config: the model's configuration.
    params: its parameters, see `language_model.init`.
    prompt_tokens: integers [B, P], P >= 1, in [0, vocab_size).
    num_tokens: tokens to generate per row, at least 1.
    key: random key; unused when greedy.
    sampling: how tokens are drawn.
    prefill_chunk: prompt tokens read at once. What is left over is read in
      powers of two, so that prompts of any length compile few programs.
    stop_token: a row that draws it repeats it from then on; generation ends
      when every row has.

  Returns:
    An iterator over int32 [B], at most `num_tokens` of them.

  Raises:
    ValueError: an argument breaks a rule above; at the call, not later.
  """
  prompt = _checked_prompt(config, prompt_tokens)
  for name, value in (
    ('num_tokens', num_tokens),
    ('prefill_chunk', prefill_chunk),
  ):
    if value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}')
  limit, total = config.max_cached_tokens, prompt.shape[1] + num_tokens - 1
  if limit is not None and total > limit:
    raise ValueError(
      'the prompt and num_tokens - 1 must fit attention.cache_length, '
      f'{limit} tokens, got {prompt.shape[1]} and num_tokens={num_tokens}; '
      'raise attention.cache_length'
    )
  if stop_token is not None and not 0 <= stop_token < config.vocab_size:
    raise ValueError(
      f'stop_token must lie in [0, {config.vocab_size}), got {stop_token}'
    )
  return _stream(
    config,
    params,
    prompt,
    num_tokens=num_tokens,
    key=key,
    sampling=sampling,
    prefill_chunk=prefill_chunk,
    stop_token=stop_token,
  )


def _checked_prompt(config, prompt_tokens):
  prompt = np.asarray(prompt_tokens)
  if prompt.ndim != 2 or not prompt.size or prompt.dtype.kind not in 'iu':
    raise ValueError(
      'prompt_tokens must be integers of shape [B, P] with B, P >= 1, got '
      f'{prompt.dtype} of shape {prompt.shape}'
    )
  if prompt.min() < 0 or prompt.max() >= config.vocab_size:
    raise ValueError(
      f'prompt_tokens must lie in [0, {config.vocab_size}), got values from '
      f'{prompt.min()} to {prompt.max()}'
    )
  return prompt.astype(np.int32)


def prefill_lengths(length: int, chunk: int) -> list[int]:
  """Cuts a prompt into whole chunks and then falling powers of two."""
  whole, rest = divmod(length, chunk)
  powers = [1 << bit for bit in reversed(range(rest.bit_length()))]
  return [chunk] * whole + [power for power in powers if rest & power]


@functools.partial(jax.jit, static_argnames='config', donate_argnames='cache')
def _read(config, params, tokens, cache):
  """Reads tokens [B, T]; returns the logits [B, vocab] after the last."""
  logits, cache = language_model.apply(config, params, tokens, cache=cache)
  return logits[:, -1], cache


@functools.partial(jax.jit, static_argnames=('sampling', 'stop_token'))
def _draw(logits, finished, key, position, *, sampling, stop_token):
  """Draws the tokens [B] of a position; returns them and who is finished."""
  token = sample(logits, jax.random.fold_in(key, position), sampling)
  if stop_token is None:
    return token, finished
  token = jnp.where(finished, stop_token, token)
  return token, finished | (token == stop_token)


def _prefill(config, params, prompt, chunk):
  """Reads a prompt [B, P]; returns the logits after it and the cache."""
  cache = language_model.init_cache(config, prompt.shape[0])
  start = 0
  for length in prefill_lengths(prompt.shape[1], chunk):
    tokens = jnp.asarray(prompt[:, start : start + length])
    logits, cache = _read(config, params, tokens, cache)
    start += length
  return logits, cache


def _stream(
  config,
  params,
  prompt,
  *,
  num_tokens,
  key,
  sampling,
  prefill_chunk,
  stop_token,
):
  logits, cache = _prefill(config, params, prompt, prefill_chunk)
  draw = functools.partial(_draw, sampling=sampling, stop_token=stop_token)
  finished = jnp.zeros((prompt.shape[0],), bool)
  end = prompt.shape[1] + num_tokens
  for position in range(prompt.shape[1], end):
    token, finished = draw(logits, finished, key, position)
    yield token
    stopped = stop_token is not None and bool(finished.all())
    if stopped or position + 1 == end:
      return
    logits, cache = _read(config, params, token[:, None], cache)
