"""Measures token mixers in one small language model: size, state and speed."""

from collections.abc import Iterable, Iterator
import dataclasses
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp

import deltanet_jax
from deltanet_jax import mixers
from experiments import config as config_lib
from experiments import result_rows
from experiments.training import train_step

Row = dict[str, Any]

KIND = 'mixer'
# Fields of a row that say what it is about.
ABOUT = ('kind', 'mixer', 'sizes')
MIXERS = tuple(mixers.MIXERS)
# Fields of `Sizes` that the program takes as flags.
SIZE_FLAGS = ('model_width', 'num_layers', 'num_heads', 'batch', 'length')
# Of decoding, what is read and drawn before time is taken: all is compiled.
_PROMPT = 8
_WARM_UP = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Sizes of the model and of what is measured.

  Attributes:
    model_width: D.
    num_layers: layers, all with the same mixer.
    num_heads: H.
    batch: rows of a training step.
    length: tokens of a row of a training step.
    decoded: tokens that are drawn one by one, batch 1.
    seconds: training steps are repeated for about that long, 3 at least.
  """

  model_width: int = 256
  num_layers: int = 4
  num_heads: int = 4
  batch: int = 4
  length: int = 512
  decoded: int = 64
  seconds: float = 3.0

  def __post_init__(self):
    for name in ('batch', 'length', 'decoded'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name} must be at least 1, got {getattr(self, name)}'
        )


def _config(mixer: str, sizes: Sizes) -> config_lib.TrainLMConfig:
  on_cpu = jax.default_backend() == 'cpu'
  return config_lib.TrainLMConfig(
    model=deltanet_jax.ModelConfig(
      vocab_size=256,
      model_width=sizes.model_width,
      num_layers=sizes.num_layers,
      num_heads=sizes.num_heads,
      mixers=(mixer,),
      dtype='float32' if on_cpu else 'bfloat16',
    ),
    data=config_lib.DataConfig(
      batch_size=sizes.batch, sequence_length=sizes.length
    ),
    training=config_lib.TrainingConfig(num_steps=10_000),
  )


def _trained(config: config_lib.TrainLMConfig, sizes: Sizes):
  """Returns (trained tokens per second, parameters)."""
  state = jax.jit(lambda: train_step.init_state(config))()
  shape = (sizes.batch, sizes.length + 1)
  tokens = jax.random.randint(jax.random.key(1), shape, 0, 256, jnp.int32)
  batch = {'tokens': tokens, 'segment_ids': jnp.ones(shape, jnp.int32)}
  step = train_step.build(config)
  state, _ = jax.block_until_ready(step(state, batch))
  begin, steps = time.perf_counter(), 0
  while steps < 3 or time.perf_counter() - begin < sizes.seconds:
    state, _ = jax.block_until_ready(step(state, batch))
    steps += 1
  seconds = time.perf_counter() - begin
  return steps * sizes.batch * sizes.length / seconds, state['params']


def _decoded_per_second(model, params, sizes: Sizes) -> float:
  stream = deltanet_jax.generate(
    model,
    params,
    jnp.zeros((1, _PROMPT), jnp.int32),
    num_tokens=_WARM_UP + sizes.decoded,
    key=jax.random.key(0),
    sampling=deltanet_jax.Sampling(greedy=True),
  )
  for token in itertools.islice(stream, _WARM_UP):
    token.block_until_ready()
  begin = time.perf_counter()
  for token in stream:
    token.block_until_ready()
  return sizes.decoded / (time.perf_counter() - begin)


def state_bytes(model: deltanet_jax.ModelConfig) -> int:
  """Returns the bytes per layer that one row carries from token to token."""
  cache = jax.eval_shape(lambda: deltanet_jax.init_cache(model, 1))
  total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  return total // model.num_layers


def measure(mixer: str, sizes: Sizes) -> Row:
  """Returns what is known of a mixer, as a row of results.

  Raises:
    ValueError: no mixer has that name, or the sizes do not fit it.
  """
  config = _config(mixer, sizes)
  trained, params = _trained(config, sizes)
  return {
    'kind': KIND,
    'mixer': mixer,
    'parameters': deltanet_jax.count_parameters(config.model),
    'state_bytes': state_bytes(config.model),
    'trained_tokens_per_s': trained,
    'decoded_tokens_per_s': _decoded_per_second(config.model, params, sizes),
    'sizes': dataclasses.asdict(sizes) | {'dtype': config.model.dtype},
    **result_rows.origin(),
  }


def rows(sizes: Sizes, names: Iterable[str] = MIXERS) -> Iterator[Row]:
  """Yields a row per mixer.

  Raises:
    ValueError: a name is none of `MIXERS`.
  """
  names = list(names)
  unknown = sorted(set(names) - set(MIXERS))
  if unknown:
    raise ValueError(f'mixers must be of {", ".join(MIXERS)}, got {unknown}')
  for name in names:
    yield measure(name, sizes)


def header() -> str:
  """Returns the heading of the table."""
  return (
    f'{"mixer":18}{"parameters":>12}{"state B/layer":>15}'
    f'{"trained tok/s":>15}{"decoded tok/s":>15}'
  )


def format_row(row: Row) -> str:
  """Returns a line under `header`."""
  return (
    f'{row["mixer"]:18}{row["parameters"]:12,}{row["state_bytes"]:15,}'
    f'{row["trained_tokens_per_s"]:15,.0f}{row["decoded_tokens_per_s"]:15,.0f}'
  )
