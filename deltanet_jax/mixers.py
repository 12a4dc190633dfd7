"""The registry of token mixers.

A mixer is an `nnx.Module` with

    from_model_config(config, *, rngs) -> mixer                 (class method)
    init_cache(batch) -> cache
    __call__(x, *, segment_ids=None, cache=None) -> (y, cache)

that is causal and gives the same y for a sequence at once, in chunks with the
cache carried on, and token by token. `tests/deltanet_jax/mixers_test.py` holds
every entry to it.
"""

from flax import nnx

from deltanet_jax import config as config_lib
from deltanet_jax.layers import delta_net

MIXERS = {'delta_net': delta_net.DeltaNet}


def build_mixer(
  name: str, config: config_lib.ModelConfig, rngs: nnx.Rngs
) -> nnx.Module:
  """Builds the mixer registered under a name.

  Raises:
    ValueError: no mixer has that name.
  """
  if name not in MIXERS:
    raise ValueError(f'mixer must be one of {", ".join(MIXERS)}, got {name!r}')
  return MIXERS[name].from_model_config(config, rngs=rngs)
