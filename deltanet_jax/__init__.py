"""DeltaNet for Flax: layers, a language model, generation.

layer = DeltaNet(512, 4, rngs=nnx.Rngs(0))
y, _ = layer(x)                                   # x, y: [B, T, 512]

config = delta_net_340m()
params = init(config, jax.random.key(0))
logits, _ = apply(config, params, tokens)         # [B, T, vocab]
"""

from deltanet_jax.config import ModelConfig
from deltanet_jax.generation import Sampling
from deltanet_jax.generation import generate
from deltanet_jax.language_model import LanguageModel
from deltanet_jax.language_model import apply
from deltanet_jax.language_model import count_parameters
from deltanet_jax.language_model import init
from deltanet_jax.language_model import init_cache
from deltanet_jax.layers.delta_net import DeltaNet
from deltanet_jax.layers.delta_net import DeltaNetConfig
from deltanet_jax.presets import delta_net_1b
from deltanet_jax.presets import delta_net_340m

__all__ = [
  'DeltaNet',
  'DeltaNetConfig',
  'LanguageModel',
  'ModelConfig',
  'Sampling',
  'apply',
  'count_parameters',
  'delta_net_1b',
  'delta_net_340m',
  'generate',
  'init',
  'init_cache',
]
