"""The models of the paper by name and size (arXiv 2406.06484, section 4).

    preset('gla', '1b')        one of NAMES, one of SIZES

340m and 1b have the paper's 24 layers of width 1024 and 2048 and its vocabulary
of 32,000, not tied. Of its 3B model it says that it follows PowerLM-3B, whose
shape (40 layers of width 2304, MLPs of 9216, a tied vocabulary of 49,152) 3b
takes over: inferred, not stated. It has no 7B model: 7b has the shape of Llama
7B (arXiv 2302.13971, table 2). `tiny` runs on a CPU.

Baselines have within 2 % of the parameters of the DeltaNet of their size:

    delta_net                  heads of 128
    delta_net_sliding_window   every second layer attends to a window of 1024
                               tokens (inferred, see `sliding_window`)
    delta_net_global           layers 2 and N/2 + 1 attend to everything; a blog
                               of the authors has N/2 - 1
    transformer                Transformer++, heads of 64
    retnet                     keys of 256, values of 512: state 512 x
    mamba                      no MLPs but twice the layers, less 2 for the
                               parameters' sake
    gla                        four heads: state 128 x and 256 x

Attention heads in the hybrids are 64 wide, as in `transformer`; the paper does
not say.
"""

from collections.abc import Callable
import dataclasses

from deltanet_jax import config as config_lib

_ATTENTION_HEAD_WIDTH = 64
_RETNET_HEAD_WIDTH = 256
_GLA_HEADS = 4
_MLP_MULTIPLE = 256

_SIZES = {
  'tiny': config_lib.ModelConfig(
    vocab_size=256,
    model_width=64,
    num_layers=4,
    num_heads=4,
    dtype='float32',
  ),
  '340m': config_lib.ModelConfig(
    vocab_size=32_000, model_width=1024, num_layers=24, num_heads=8
  ),
  '1b': config_lib.ModelConfig(
    vocab_size=32_000, model_width=2048, num_layers=24, num_heads=16
  ),
  '3b': config_lib.ModelConfig(
    vocab_size=49_152,
    model_width=2304,
    num_layers=40,
    num_heads=18,
    mlp_width=9216,
    tie_embeddings=True,
  ),
  '7b': config_lib.ModelConfig(
    vocab_size=32_000,
    model_width=4096,
    num_layers=32,
    num_heads=32,
    mlp_width=11_008,
  ),
}
_MAMBA_LAYERS = {'tiny': 6, '340m': 46, '1b': 46, '3b': 102, '7b': 62}
SIZES = tuple(_SIZES)


def _delta_net(config, size):
  del size
  return config


def _attention_heads(config):
  """Returns the config with attention heads of the usual width."""
  heads = max(2, config.model_width // _ATTENTION_HEAD_WIDTH)
  return dataclasses.replace(
    config,
    attention=dataclasses.replace(config.attention, num_heads=heads),
    sliding_window=dataclasses.replace(config.sliding_window, num_heads=heads),
  )


def _delta_net_sliding_window(config, size):
  del size
  mixers = ('delta_net', 'sliding_window')
  return dataclasses.replace(_attention_heads(config), mixers=mixers)


def _delta_net_global(config, size):
  del size
  layers = ['delta_net'] * config.num_layers
  layers[1] = layers[config.num_layers // 2] = 'attention'
  return dataclasses.replace(_attention_heads(config), mixers=tuple(layers))


def _transformer(config, size):
  del size
  return dataclasses.replace(_attention_heads(config), mixers=('attention',))


def _retnet(config, size):
  """Takes off the MLP what the wider values cost: 4 D^2 of 3 D F."""
  del size
  width = config.resolved_mlp_width - 4 * config.model_width / 3
  return dataclasses.replace(
    config,
    mixers=('retnet',),
    num_heads=max(1, config.model_width // _RETNET_HEAD_WIDTH),
    mlp_width=round(width / _MLP_MULTIPLE) * _MLP_MULTIPLE,
  )


def _mamba(config, size):
  return dataclasses.replace(
    config, mixers=('mamba',), use_mlp=False, num_layers=_MAMBA_LAYERS[size]
  )


def _gla(config, size):
  del size
  return dataclasses.replace(config, mixers=('gla',), num_heads=_GLA_HEADS)


_MODELS: dict[str, Callable] = {
  'delta_net': _delta_net,
  'delta_net_sliding_window': _delta_net_sliding_window,
  'delta_net_global': _delta_net_global,
  'transformer': _transformer,
  'retnet': _retnet,
  'mamba': _mamba,
  'gla': _gla,
}
NAMES = tuple(_MODELS)


def preset(name: str, size: str) -> config_lib.ModelConfig:
  """Returns a model of the paper, see the module.

  Args:
    name: one of `NAMES`.
    size: one of `SIZES`.

  Raises:
    ValueError: there is no such name or size.
  """
  if name not in _MODELS:
    raise ValueError(f'name must be one of {", ".join(NAMES)}, got {name!r}')
  if size not in _SIZES:
    raise ValueError(f'size must be one of {", ".join(SIZES)}, got {size!r}')
  return _MODELS[name](_SIZES[size], size)


def delta_net_340m() -> config_lib.ModelConfig:
  """Returns DeltaNet 340M: 374,362,112 parameters, vocabulary 32,000."""
  return preset('delta_net', '340m')


def delta_net_1b() -> config_lib.ModelConfig:
  """Returns DeltaNet 1.3B: 1,365,677,056 parameters, vocabulary 32,000."""
  return preset('delta_net', '1b')
