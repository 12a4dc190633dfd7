"""The models of the synthetic tasks: the library's mixers in authors' blocks.

    h = embedding[tokens] (+ positions)
    h = h + mixer(norm(h)); h = h + state_mixer(norm(h))      for every layer
    logits = norm(h) W (+ b)

With `BlockConfig()` that is `deltanet_jax.LanguageModel`, its layers not
scanned. A readout computes logits where they are asked for alone: with a large
vocabulary and few scored positions that is most of the work.
"""

import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

import deltanet_jax
from deltanet_jax import block as block_lib
from deltanet_jax import mixers
from deltanet_jax.layers import linear
from deltanet_jax.layers import norm
from experiments.synthetic import config as config_lib

Params = dict[str, Any]

_LAYER_NORM_EPS = 1e-5
_POSITION_BASE = 10_000.0


def _build_norm(kind: config_lib.Norm, width: int, eps: float, rngs: nnx.Rngs):
  if kind == 'layer':
    return nnx.LayerNorm(width, epsilon=_LAYER_NORM_EPS, rngs=rngs)
  return norm.RMSNorm(width, eps=eps)


class IdentityBlock(nnx.Module):
  """x += mixer(norm(x)); x += norm(x): Zoology's block without an MLP.

  Its state mixer is the identity, of which the normalised stream comes out and
  is added. https://github.com/HazyResearch/zoology, d88d6f54.
  """

  def __init__(
    self,
    mixer: str,
    config: deltanet_jax.ModelConfig,
    block: config_lib.BlockConfig,
    *,
    rngs: nnx.Rngs,
  ):
    width, eps = config.model_width, config.norm_eps
    self.mixer_norm = _build_norm(block.norm, width, eps, rngs)
    self.mixer = mixers.build_mixer(mixer, config, rngs)
    self.state_norm = _build_norm(block.norm, width, eps, rngs)

  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    """Maps x [B, T, D] to [B, T, D]."""
    y, _ = self.mixer(self.mixer_norm(x))
    x = x + y
    return x + self.state_norm(x), None


class TokenReadout(nnx.Module):
  """logits = x W (+ b), N(0, 0.02^2) at first and the bias 0."""

  def __init__(self, width: int, vocab_size: int, *, use_bias, dtype, rngs):
    self.kernel = nnx.Param(
      linear.INIT_STDDEV * jax.random.normal(rngs.params(), (width, vocab_size))
    )
    self.use_bias = use_bias
    self.dtype = dtype
    if use_bias:
      self.bias = nnx.Param(jnp.zeros((vocab_size,), jnp.float32))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, N, D] to float32 logits [B, N, vocab]."""
    x = x.astype(self.dtype)
    y = linear.project_to_float32(x, self.kernel[...])
    return y + self.bias[...][None, None] if self.use_bias else y


def _sinusoids(length: int, width: int) -> jax.Array:
  """Returns [length, width], half sines and half cosines."""
  half = width // 2
  exponents = jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1)
  positions = jnp.arange(length, dtype=jnp.float32)
  angles = positions[:, None] * _POSITION_BASE ** -exponents[None]
  table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
  return jnp.pad(table, ((0, 0), (0, width - 2 * half)))


class Decoder(nnx.Module):
  """Decodes one state into all tokens: MAD's auto-encoder for compression.

      z_p = e + sinusoids(p);  z = GELU(norm(z) W_i + b_i), i = 1, 2

  without residuals. https://github.com/athms/mad-lab, 0f49a452.
  """

  def __init__(self, config: deltanet_jax.ModelConfig, *, rngs: nnx.Rngs):
    width = config.model_width
    for i in (1, 2):
      setattr(self, f'norm_{i}', norm.RMSNorm(width, eps=config.norm_eps))
      layer = linear.linear(
        width, width, use_bias=True, dtype=config.dtype, rngs=rngs
      )
      setattr(self, f'linear_{i}', layer)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [B, T, D], of which the last position is read, to [B, T, D]."""
    table = _sinusoids(x.shape[1], x.shape[2])[None].astype(x.dtype)
    z = x[:, -1:] + table
    z = jax.nn.gelu(self.linear_1(self.norm_1(z)), approximate=False)
    return jax.nn.gelu(self.linear_2(self.norm_2(z)), approximate=False)


def _build_block(mixer, config, block, rngs):
  if block.identity_state_mixer:
    return IdentityBlock(mixer, config, block, rngs=rngs)
  result = block_lib.Block(mixer, config, rngs=rngs)
  if block.norm == 'layer':
    width = config.model_width
    result.mixer_norm = _build_norm('layer', width, 0, rngs)
    if config.use_mlp:
      result.mlp_norm = _build_norm('layer', width, 0, rngs)
  return result


class SyntheticModel(nnx.Module):
  """See the module."""

  def __init__(self, run: config_lib.RunConfig, *, rngs: nnx.Rngs):
    config, block = run.resolved_model, run.block
    width = config.model_width
    self.run = run
    self.embedding = nnx.Embed(
      config.vocab_size,
      width,
      dtype=jnp.dtype(config.dtype),
      embedding_init=nnx.initializers.normal(linear.INIT_STDDEV),
      rngs=rngs,
    )
    if block.positions == 'learned':
      self.positions = nnx.Param(
        linear.INIT_STDDEV
        * jax.random.normal(rngs.params(), (run.max_length, width))
      )
    names = config.mixers * (config.num_layers // len(config.mixers))
    self.blocks = nnx.Dict(
      {
        f'block_{i}': _build_block(name, config, block, rngs)
        for i, name in enumerate(names)
      }
    )
    if block.readout == 'auto_encoder':
      self.decoder = Decoder(config, rngs=rngs)
    self.final_norm = _build_norm(block.norm, width, config.norm_eps, rngs)
    if not config.tie_embeddings:
      self.output = TokenReadout(
        width,
        config.vocab_size,
        use_bias=block.output_bias,
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
      )

  def _drop(self, x, key):
    rate = self.run.block.embedding_dropout
    if not rate or key is None:
      return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)

  def __call__(
    self,
    tokens: jax.Array,
    *,
    at: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
  ) -> jax.Array:
    """Returns float32 logits [B, N, vocab] at the positions `at` [B, N].

    Args:
      tokens: int32 [B, T].
      at: int32 [B, N]; None: all positions.
      dropout_key: None: nothing is dropped.
    """
    x = self.embedding(tokens)  # [B, T, D]
    if self.run.block.positions == 'learned':
      table = self.positions[...][: x.shape[1]]
      x = x + table[None].astype(x.dtype)
    x = self._drop(x, dropout_key)
    for block in self.blocks.values():
      x, _ = block(x)
    if self.run.block.readout == 'auto_encoder':
      x = self.decoder(x)
    if at is not None:
      x = jnp.take_along_axis(x, at[:, :, None], axis=1)  # [B, N, D]
    x = self.final_norm(x)
    if self.run.resolved_model.tie_embeddings:
      table = self.embedding.embedding[...]
      return linear.project_to_float32(x.astype(self.embedding.dtype), table.T)
    return self.output(x)


def init(run: config_lib.RunConfig, key: jax.Array) -> Params:
  """Returns initial parameters: nested dicts of float32 arrays."""
  model = SyntheticModel(run, rngs=nnx.Rngs(key))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.lru_cache(maxsize=64)
def _graph(run):
  abstract = nnx.eval_shape(lambda: SyntheticModel(run, rngs=nnx.Rngs(0)))
  return nnx.split(abstract)[0]


def apply(
  run: config_lib.RunConfig,
  params: Params,
  tokens: jax.Array,
  *,
  at: jax.Array | None = None,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Runs `SyntheticModel` on the parameters of `init`; see its `__call__`."""
  model = nnx.merge(_graph(run), params)
  return model(tokens, at=at, dropout_key=dropout_key)


def count_parameters(run: config_lib.RunConfig) -> int:
  """Returns the number of parameters without allocating them."""
  params = jax.eval_shape(functools.partial(init, run), jax.random.key(0))
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
