"""DeltaNet and what it is compared with: layers, language models, generation.

layer = DeltaNet(512, 4, rngs=nnx.Rngs(0))
y, _ = layer(x)                                   # x, y: [B, T, 512]

config = preset('delta_net', '340m')           # or ModelConfig(mixers=...)
params = init(config, jax.random.key(0))
logits, _ = apply(config, params, tokens)         # [B, T, vocab]
"""

from deltanet_jax.config import ModelConfig
from deltanet_jax.generation import Sampling
from deltanet_jax.generation import generate
from deltanet_jax.language_model import LanguageModel
from deltanet_jax.language_model import apply
from deltanet_jax.language_model import count_parameters
from deltanet_jax.language_model import hidden_states
from deltanet_jax.language_model import init
from deltanet_jax.language_model import init_cache
from deltanet_jax.layers.abc import ABC
from deltanet_jax.layers.attention import Attention
from deltanet_jax.layers.attention import SlidingWindow
from deltanet_jax.layers.block_delta_net import BlockDeltaNet
from deltanet_jax.layers.delta_net import DeltaNet
from deltanet_jax.layers.delta_net import DeltaNetConfig
from deltanet_jax.layers.delta_product import DeltaProduct
from deltanet_jax.layers.gated_delta_net import GatedDeltaNet
from deltanet_jax.layers.gated_rfa import GatedRFA
from deltanet_jax.layers.gla import GLA
from deltanet_jax.layers.gsa import GSA
from deltanet_jax.layers.h3 import H3
from deltanet_jax.layers.hgrn2 import HGRN2
from deltanet_jax.layers.hyena import Hyena
from deltanet_jax.layers.hyena import MultiheadHyena
from deltanet_jax.layers.kimi_delta import KimiDelta
from deltanet_jax.layers.linear_attention import LinearAttention
from deltanet_jax.layers.mamba import Mamba
from deltanet_jax.layers.mamba2 import Mamba2
from deltanet_jax.layers.mlstm import MLSTM
from deltanet_jax.layers.retnet import RetNet
from deltanet_jax.layers.rwkv4 import RWKV4
from deltanet_jax.layers.rwkv6 import RWKV6
from deltanet_jax.layers.rwkv7 import RWKV7
from deltanet_jax.layers.schlag import Schlag
from deltanet_jax.losses import cross_entropy
from deltanet_jax.losses import summed_cross_entropy
from deltanet_jax.presets import delta_net_1b
from deltanet_jax.presets import delta_net_340m
from deltanet_jax.presets import preset

__all__ = [
  'ABC',
  'Attention',
  'BlockDeltaNet',
  'DeltaNet',
  'DeltaNetConfig',
  'DeltaProduct',
  'GLA',
  'GSA',
  'GatedDeltaNet',
  'GatedRFA',
  'H3',
  'HGRN2',
  'Hyena',
  'KimiDelta',
  'LanguageModel',
  'LinearAttention',
  'MLSTM',
  'Mamba',
  'Mamba2',
  'ModelConfig',
  'MultiheadHyena',
  'RWKV4',
  'RWKV6',
  'RWKV7',
  'RetNet',
  'Sampling',
  'Schlag',
  'SlidingWindow',
  'apply',
  'count_parameters',
  'cross_entropy',
  'delta_net_1b',
  'delta_net_340m',
  'generate',
  'hidden_states',
  'init',
  'init_cache',
  'preset',
  'summed_cross_entropy',
]
