"""The residual block of the language model."""

from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name

from deltanet_jax import config as config_lib
from deltanet_jax import mixers
from deltanet_jax.layers import mlp
from deltanet_jax.layers import norm

# The name under which `jax.checkpoint` knows what a block's mixer returns.
MIXER_OUTPUT = 'mixer_output'


class Block(nnx.Module):
  """x += mixer(RMSNorm(x)); x += SwiGLU(RMSNorm(x)), if it has an MLP."""

  def __init__(
    self, mixer: str, config: config_lib.ModelConfig, *, rngs: nnx.Rngs
  ):
    """Builds a block.

    Args:
      mixer: name of its token mixer, see `deltanet_jax.mixers`.
      config: the model's.
      rngs: source of the initial parameters.
    """
    width, eps = config.model_width, config.norm_eps
    self.mixer_norm = norm.RMSNorm(width, eps=eps)
    self.mixer = mixers.build_mixer(mixer, config, rngs)
    self.use_mlp = config.use_mlp
    if not config.use_mlp:
      return
    self.mlp_norm = norm.RMSNorm(width, eps=eps)
    self.mlp = mlp.SwiGLU(
      width, config.resolved_mlp_width, dtype=config.dtype, rngs=rngs
    )

  def init_cache(self, batch: int) -> Any:
    """Returns the mixer's cache."""
    return self.mixer.init_cache(batch)

  def __call__(
    self,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: Any = None,
  ) -> tuple[jax.Array, Any]:
    """Maps x [B, T, D] to [B, T, D]; the cache is the mixer's."""
    y, cache = self.mixer(
      self.mixer_norm(x), segment_ids=segment_ids, cache=cache
    )
    x = x + checkpoint_name(y, MIXER_OUTPUT)
    if not self.use_mlp:
      return x, cache
    return x + self.mlp(self.mlp_norm(x)), cache
