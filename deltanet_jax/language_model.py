"""A decoder-only language model over any token mixer.

`LanguageModel` is the module; `init`, `apply`, `init_cache` are the same model
as pure functions of a nested dict of float32 arrays, which is what a trainer
wants: nothing of NNX runs outside of tracing.

Initial values (standard deviation 0.02 as in the paper's code base):

    parameter                               shape           distribution
    embedding.embedding                     [vocab, D]      N(0, 0.02^2)
    blocks.block_i.mixer_norm.scale         [R, D]          1
    blocks.block_i.mixer.{q,k,v}_proj       [R, D, H K]     N(0, 0.02^2)
    blocks.block_i.mixer.beta_proj          [R, D, H]       N(0, 0.02^2)
    blocks.block_i.mixer.gate_proj          [R, D, H K]     N(0, 0.02^2)
    blocks.block_i.mixer.{q,k,v}_conv       [R, W, H K]     U(-1, 1) / sqrt(W)
    blocks.block_i.mixer.head_norm.scale    [R, K]          1
    blocks.block_i.mixer.o_proj             [R, H K, D]     N(0, 0.02^2)
    blocks.block_i.mlp_norm.scale           [R, D]          1
    blocks.block_i.mlp.{gate,up}            [R, D, F]       N(0, 0.02^2)
    blocks.block_i.mlp.down                 [R, F, D]       N(0, 0.02^2)
    final_norm.scale                        [D]             1
    output.kernel                           [D, vocab]      N(0, 0.02^2)

Block i stands for the i-th run of equal mixers in the period (`config.runs`):
its parameters are stacked over the R repeats of the period and, where the run
is of n > 1 layers, over these: [R, n, ...]. Both are scanned, so a model of any
depth compiles as many blocks as its period has runs, unless `scan_layers` of
the configuration is False.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax import block as block_lib
from deltanet_jax import config as config_lib
from deltanet_jax import sharding
from deltanet_jax.layers import embedding
from deltanet_jax.layers import linear
from deltanet_jax.layers import norm
from deltanet_jax.layers import recurrence
from pallas_kernels import sequence_parallel

Params = dict[str, Any]
Cache = dict[str, Any]


def _stacked(build, size):
  """Vectorises `build(rngs)`: every parameter gets a leading [size]."""
  return nnx.split_rngs(splits=size)(nnx.vmap(build, in_axes=0, out_axes=0))


def _stacked_blocks(config, rngs):
  """Returns the blocks of a period, every parameter with a leading [R]."""

  def build_run(rngs, mixer, length):
    def build(rngs):
      return block_lib.Block(mixer, config, rngs=rngs)

    return (build if length == 1 else _stacked(build, length))(rngs)

  def build_period(rngs):
    return nnx.Dict(
      {
        f'block_{i}': build_run(rngs, mixer, length)
        for i, (mixer, length) in enumerate(config.runs)
      }
    )

  return _stacked(build_period, config.num_repeats)(rngs)


_POLICIES = jax.checkpoint_policies
# What the kernels of the delta rule find and need again, see `mosaic_gpu`, and
# what the devices that share a row do.
_FOUND = (
  *(f'delta_rule_{x}' for x in ('chunk_inverse', 'norms', 'states')),
  sequence_parallel.STATES,
)
_IS_OF_RECURRENCE = _POLICIES.save_only_these_names(recurrence.OUTPUT, *_FOUND)


def _keep_products(primitive, *operands, **settings) -> bool:
  """The policy of `dots`, see `config.ModelConfig`."""
  return (
    # cuDNN's attention, output and sums; other attention is products.
    primitive.name.startswith('dot_product_attention_fwd')
    or _IS_OF_RECURRENCE(primitive, *operands, **settings)
    or _POLICIES.dots_with_no_batch_dims_saveable(
      primitive, *operands, **settings
    )
  )


_REMAT_POLICIES = {
  'dots': _keep_products,
  'mixer': _POLICIES.save_only_these_names(
    block_lib.MIXER_OUTPUT,
    *(f'delta_rule_{x}' for x in ('q', 'k', 'v', 'beta', 'g', 'initial_state')),
    *_FOUND,
  ),
  'offload': _POLICIES.offload_dot_with_no_batch_dims('device', 'pinned_host'),
  'full': _POLICIES.nothing_saveable,
}


def _rematerialize(
  function: Callable, config: config_lib.ModelConfig, length: int, params: Any
) -> Callable:
  """Wraps the pure function of a run's blocks with `config.remat`."""
  # A scan of several layers keeps the forward and the recomputation in two
  # loops, which XLA cannot merge; unrolled, as a single one is, it could.
  is_loop = config.scan_layers and config.num_repeats * length > 1
  prevent_cse = not is_loop
  if config.remat == 'none':
    layer = jax.tree.map(lambda x: x[0], params) if length > 1 else params
    return sharding.except_gathered(function, layer, prevent_cse=prevent_cse)
  policy = _REMAT_POLICIES[config.remat]
  return jax.checkpoint(function, policy=policy, prevent_cse=prevent_cse)


class LanguageModel(nnx.Module):
  """Embedding, blocks, RMSNorm, output projection."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    """Builds the model; `rngs` gives the initial parameters."""
    self.config = config
    self.embedding = nnx.Embed(
      config.vocab_size,
      config.model_width,
      dtype=jnp.dtype(config.dtype),
      embedding_init=nnx.initializers.normal(linear.INIT_STDDEV),
      rngs=rngs,
    )
    self.blocks = _stacked_blocks(config, rngs)
    self.final_norm = norm.RMSNorm(config.model_width, eps=config.norm_eps)
    if not config.tie_embeddings:
      self.output = linear.linear(
        config.model_width, config.vocab_size, dtype=config.dtype, rngs=rngs
      )

  def init_cache(self, batch: int) -> Cache:
    """Returns the cache of `batch` rows that have seen no token."""

    def stack(length, leaf):
      layers = (self.config.num_repeats, length)[: 1 + (length > 1)]
      return jnp.tile(leaf, (*layers, *(1,) * leaf.ndim))

    return {
      name: jax.tree.map(
        functools.partial(stack, length), block.init_cache(batch)
      )
      for (_, length), (name, block) in zip(
        self.config.runs, self.blocks.items(), strict=True
      )
    }

  def __call__(
    self,
    tokens: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Predicts the next token at every position.

    Args:
      tokens: int32 [B, T], in [0, vocab_size).
      segment_ids: int32 [B, T]: the document of every token, 0 is padding;
        None: the row's last document goes on.
      cache: what the rows remember, from `init_cache` or an earlier call;
        None: they start here.

    Returns:
      float32 logits [B, T, vocab] and the new cache (None without one).
    """
    x, cache = self.hidden_states(tokens, segment_ids=segment_ids, cache=cache)
    return linear.project_to_float32(x, self.output_kernel), cache

  @property
  def output_kernel(self) -> jax.Array:
    """What hidden states are multiplied by for logits, float32 [D, vocab]."""
    if self.config.tie_embeddings:
      return self.embedding.embedding[...].T
    return self.output.kernel[...]

  def hidden_states(
    self,
    tokens: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Returns what logits are projected from, [B, T, D]; see `__call__`."""
    tokens = sharding.constrain(tokens, 'tokens')
    if segment_ids is not None:
      segment_ids = sharding.constrain(segment_ids, 'ids')
    x = sharding.constrain(self._embed(tokens), 'stream')
    x, cache = self._run_blocks(x, segment_ids, cache)
    return self.final_norm(x), cache

  def _embed(self, tokens):
    """Returns the embeddings [B, T, D]."""
    x = embedding.lookup(self.embedding.embedding[...], tokens)
    return x.astype(jnp.dtype(self.config.dtype))

  def _run_blocks(self, x, segment_ids, cache):
    """Scans the repeats of the period over x [B, T, D]."""
    unroll = not self.config.scan_layers
    split = {name: nnx.split(block) for name, block in self.blocks.items()}
    graphs = {name: graph for name, (graph, _) in split.items()}
    params = {name: leaves for name, (_, leaves) in split.items()}

    def run_block(graph, x, layer):
      params, cache = layer
      block = nnx.merge(graph, sharding.gather(params))
      x, cache = block(x, segment_ids=segment_ids, cache=cache)
      return sharding.constrain(x, 'stream'), cache

    def run_period(x, layer):
      params, cache = layer
      new = {}
      for (_, length), (name, graph) in zip(
        self.config.runs, graphs.items(), strict=True
      ):
        run = functools.partial(run_block, graph)
        run = _rematerialize(run, self.config, length, params[name])
        if length > 1:
          run = functools.partial(jax.lax.scan, run, unroll=unroll)
        past = None if cache is None else cache[name]
        x, new[name] = run(x, (params[name], past))
      return x, None if cache is None else new

    return jax.lax.scan(run_period, x, (params, cache), unroll=unroll)


def init(config: config_lib.ModelConfig, key: jax.Array) -> Params:
  """Returns initial parameters: nested dicts of float32 arrays."""
  model = LanguageModel(config, rngs=nnx.Rngs(key))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def apply(
  config: config_lib.ModelConfig,
  params: Params,
  tokens: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  cache: Cache | None = None,
) -> tuple[jax.Array, Cache | None]:
  """Runs `LanguageModel` on the parameters of `init`.

  Args:
    config: the configuration `params` were made for.
    params: nested dict as `init` returns it.
    tokens: int32 [B, T].
    segment_ids: see `LanguageModel.__call__`.
    cache: see `LanguageModel.__call__`.

  Returns:
    float32 logits [B, T, vocab] and the new cache (None without one).

  Raises:
    ValueError: shapes or names do not fit, naming the first that differs.
  """
  _check_tokens(tokens, segment_ids)
  model = _merge(config, params)
  return model(tokens, segment_ids=segment_ids, cache=cache)


def hidden_states(
  config: config_lib.ModelConfig,
  params: Params,
  tokens: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns what `apply` multiplies for its logits, for a loss in parts.

  Args:
    config: as of `apply`.
    params: as of `apply`.
    tokens: as of `apply`.
    segment_ids: as of `apply`.

  Returns:
    Hidden states [B, T, D] in the dtype of the activations and the float32
    kernel [D, vocab]; `losses.cross_entropy` takes both.

  Raises:
    ValueError: as of `apply`.
  """
  _check_tokens(tokens, segment_ids)
  model = _merge(config, params)
  x, _ = model.hidden_states(tokens, segment_ids=segment_ids)
  return x, model.output_kernel


def _check_tokens(tokens, segment_ids):
  """Raises ValueError unless both are integers [B, T]."""
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(
      f'tokens must be integers of shape [B, T], got {tokens.dtype} of shape '
      f'{tuple(tokens.shape)}'
    )
  if segment_ids is not None and segment_ids.shape != tokens.shape:
    raise ValueError(
      f'segment_ids must have the shape of tokens, {tuple(tokens.shape)}, got '
      f'{tuple(segment_ids.shape)}'
    )


def _merge(config, params):
  """Returns the model with these parameters, once their shapes are checked."""
  _check_params(config, params)
  return nnx.merge(_graph(config), params)


def init_cache(config: config_lib.ModelConfig, batch: int) -> Cache:
  """Returns the cache of `batch` rows that have seen no token."""
  if batch < 1:
    raise ValueError(f'batch must be at least 1, got {batch}')
  return _abstract_model(config).init_cache(batch)


def count_parameters(config: config_lib.ModelConfig) -> int:
  """Returns the number of parameters without allocating them."""
  return sum(math.prod(shape) for shape in _parameter_shapes(config).values())


def _abstract_model(config):
  return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


@functools.lru_cache(maxsize=64)
def _graph(config):
  return nnx.split(_abstract_model(config))[0]


def _shapes_by_name(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


@functools.lru_cache(maxsize=64)
def _parameter_shapes(config):
  params = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
  return _shapes_by_name(params)


def _check_params(config, params):
  expected, got = _parameter_shapes(config), _shapes_by_name(params)
  for name in sorted(expected.keys() | got.keys()):
    if expected.get(name) != got.get(name):
      raise ValueError(
        f'params do not fit the configuration: {name} must be '
        f'{expected.get(name, "absent")}, got {got.get(name, "none")}'
      )
