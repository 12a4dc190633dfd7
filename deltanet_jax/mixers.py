"""The registry of token mixers.

A mixer is a `layers.mixer.Mixer` with

    init_cache(batch) -> cache
    __call__(x, *, segment_ids=None, cache=None) -> (y, cache)

that is causal and gives the same y for a sequence at once, in chunks with the
cache carried on, and token by token. `tests/deltanet_jax/mixers_test.py` holds
every entry to it. The options of the mixer NAME are `ModelConfig.NAME`; a
hybrid is a tuple of names in `ModelConfig.mixers`.
"""

from flax import nnx

from deltanet_jax import config as config_lib
from deltanet_jax.layers import abc
from deltanet_jax.layers import attention
from deltanet_jax.layers import block_delta_net
from deltanet_jax.layers import delta_net
from deltanet_jax.layers import delta_product
from deltanet_jax.layers import gated_delta_net
from deltanet_jax.layers import gated_rfa
from deltanet_jax.layers import gla
from deltanet_jax.layers import gsa
from deltanet_jax.layers import h3
from deltanet_jax.layers import hgrn2
from deltanet_jax.layers import hyena
from deltanet_jax.layers import kimi_delta
from deltanet_jax.layers import linear_attention
from deltanet_jax.layers import mamba
from deltanet_jax.layers import mamba2
from deltanet_jax.layers import mixer
from deltanet_jax.layers import mlstm
from deltanet_jax.layers import retnet
from deltanet_jax.layers import rwkv4
from deltanet_jax.layers import rwkv6
from deltanet_jax.layers import rwkv7
from deltanet_jax.layers import schlag

MIXERS: dict[str, type[mixer.Mixer]] = {
  'attention': attention.Attention,
  'sliding_window': attention.SlidingWindow,
  'delta_net': delta_net.DeltaNet,
  'gated_delta_net': gated_delta_net.GatedDeltaNet,
  'delta_product': delta_product.DeltaProduct,
  'kimi_delta': kimi_delta.KimiDelta,
  'rwkv7': rwkv7.RWKV7,
  'block_delta_net': block_delta_net.BlockDeltaNet,
  'linear_attention': linear_attention.LinearAttention,
  'retnet': retnet.RetNet,
  'gla': gla.GLA,
  'mamba2': mamba2.Mamba2,
  'hgrn2': hgrn2.HGRN2,
  'mlstm': mlstm.MLSTM,
  'schlag': schlag.Schlag,
  'gated_rfa': gated_rfa.GatedRFA,
  'rwkv6': rwkv6.RWKV6,
  'gsa': gsa.GSA,
  'abc': abc.ABC,
  'mamba': mamba.Mamba,
  'rwkv4': rwkv4.RWKV4,
  'hyena': hyena.Hyena,
  'multihead_hyena': hyena.MultiheadHyena,
  'h3': h3.H3,
}


def build_mixer(
  name: str, config: config_lib.ModelConfig, rngs: nnx.Rngs
) -> mixer.Mixer:
  """Builds the mixer registered under a name.

  Raises:
    ValueError: no mixer has that name.
  """
  if name not in MIXERS:
    raise ValueError(f'mixer must be one of {", ".join(MIXERS)}, got {name!r}')
  return MIXERS[name](
    config.model_width,
    config.num_heads,
    head_dim=config.resolved_head_dim,
    config=getattr(config, name),
    norm_eps=config.norm_eps,
    dtype=config.dtype,
    rngs=rngs,
  )
