"""Floating-point operations of a model by formula, and how much of a peak.

Model FLOPs are those that the mathematics of a step asks for, forward and
backward, whatever the program recomputes or pads. Per token,

    6 N + sum over the layers of core(mixer, T),

where N are the numbers that multiply activations (a product costs 2 FLOPs
forward and 4 backward per number): all kernels and the output projection, tied
or not, but neither the look-up nor convolutions over a few taps (Kaplan et al.,
arXiv 2001.08361, section 2.1). The cores, per token, forward and backward:

    recurrences in matrix form   `benchmark_flops`: the chunkwise form, C = 32
    attention                    12 H K p, with p the tokens a query sees, on
                                 average over a row of T: (T + 1) / 2, and with
                                 a window w < T  w - w (w - 1) / (2 T)
                                 (PaLM, arXiv 2204.02311, appendix B, has 12 H K
                                 T: what causal attention skips counts there)
    slots (ABC, GSA), M of them  two linear attentions, K to M and M to V
    random features, M           8 H M K: q and k, and their gradients, since
                                 the directions are no parameters
    long convolutions            3 (10 log2(2 T) + 6) per channel: transforms of
                                 length n = 2 T at 5/2 n log2(n), 2 of them and
                                 a product of spectra, forward and twice
                                 backward (after Hyena, arXiv 2302.10866, A.2)
    selective scan, N states     3 x 7 per channel and state: what arXiv
                                 2312.00752, algorithm 2, does token by token
    diagonal state space, N      3 x 12 per channel and complex mode
    weighted average (RWKV-4)    3 x 11 per channel

Decays, gates, norms, activations and the loss do not count, nor does the
network that gives a long convolution its filter.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import re
from typing import Any

import jax

import deltanet_jax
from experiments import benchmark_cases
from experiments import benchmark_flops
from experiments import chips
from experiments import config as config_lib

_NO_PRODUCT = re.compile(r'conv\.kernel$')
_PRODUCT = re.compile(r'(^|\.)(kernel|shift_down|shift_up)$')


def _recurrence(
  op: str, heads: int, key: int, value: int, keys_per_token: int = 1
) -> float:
  case = benchmark_cases.Case(
    op=op,
    name='model',
    B=1,
    T=1,
    H=heads,
    K=key,
    V=value,
    keys_per_token=keys_per_token,
  )
  return benchmark_flops.flops(case, 'forward_backward')


def _delta_net(model, options, length):
  del options, length
  heads, width = model.num_heads, model.resolved_head_dim
  return _recurrence('delta_rule', heads, width, width)


def _gated_delta_net(model, options, length):
  del length
  heads, width = model.num_heads, model.resolved_head_dim
  values = options.value_expansion * width
  return _recurrence('delta_rule', heads, width, values)


def _delta_product(model, options, length):
  del length
  heads, width = model.num_heads, model.resolved_head_dim
  values = options.value_expansion * width
  num = options.num_householder
  return _recurrence('delta_product', heads, width, values, num)


def _block_delta_net(model, options, length):
  del length
  heads, width = model.num_heads, model.resolved_head_dim
  blocks = options.num_blocks
  return _recurrence('delta_rule', heads * blocks, width // blocks, width)


def _schlag(model, options, length):
  del length
  heads, width = model.num_heads, model.resolved_head_dim
  features = width * (2 * options.nu if options.feature_map == 'dpfp' else 1)
  return _recurrence('delta_rule', heads, features, width)


def _rwkv7(model, options, length):
  del options, length
  heads, width = model.num_heads, model.resolved_head_dim
  return _recurrence('diagonal_plus_low_rank', heads, width, width)


def _linear(keys: float = 1, values: float = 1, extra: int = 0):
  """Returns the core of linear attention, K and V in multiples of a head."""

  def core(model, options, length):
    del options, length
    heads, width = model.num_heads, model.resolved_head_dim
    key, value = round(keys * width), round(values * width) + extra
    return _recurrence('linear_attention', heads, key, value)

  return core


def _linear_attention(model, options, length):
  return _linear(extra=int(options.use_normalizer))(model, options, length)


def _retnet(model, options, length):
  return _linear(values=options.value_expansion)(model, options, length)


def _gla(model, options, length):
  return _linear(keys=options.key_expansion)(model, options, length)


def _mlstm(model, options, length):
  core = _linear(keys=options.key_expansion, extra=1)
  return core(model, options, length)


def _mamba2(model, options, length):
  del length
  inner = options.expansion * model.resolved_head_dim
  heads, states = model.num_heads, options.state_size
  return _recurrence('linear_attention', heads, states, inner)


def _gated_rfa(model, options, length):
  del length
  heads, width = model.num_heads, model.resolved_head_dim
  directions = options.num_directions
  features = 8 * heads * directions * width
  return features + _recurrence(
    'linear_attention', heads, 2 * directions, width + 1
  )


def _slots(model, options, key):
  heads, width, slots = (
    model.num_heads,
    model.resolved_head_dim,
    options.num_slots,
  )
  return _recurrence('linear_attention', heads, key, slots) + _recurrence(
    'linear_attention', heads, slots, width
  )


def _gsa(model, options, length):
  del length
  return _slots(model, options, model.resolved_head_dim)


def _abc(model, options, length):
  del length
  key = round(options.key_expansion * model.resolved_head_dim)
  return _slots(model, options, key)


def _attention(model, options, length):
  window = min(getattr(options, 'window', length), length)
  seen = window - window * (window - 1) / (2 * length)
  heads = options.num_heads or model.num_heads
  width = (
    model.model_width // heads if options.num_heads else model.resolved_head_dim
  )
  return 12 * heads * width * seen


def _long_convolution(channels: float, length: int) -> float:
  return 3 * channels * (10 * math.log2(2 * length) + 6)


def _hyena(model, options, length):
  filters = options.order - 1
  return filters * _long_convolution(model.model_width, length)


def _multihead_hyena(model, options, length):
  products = model.model_width * options.head_width
  return 6 * products + _long_convolution(products, length)


def _mamba(model, options, length):
  del length
  return 21 * options.expansion * model.model_width * options.state_size


def _h3(model, options, length):
  del length
  products = model.model_width * options.head_width
  return products * (36 * options.state_size + 6)


def _rwkv4(model, options, length):
  del options, length
  return 33 * model.model_width


# Takes the model, the options of the mixer and the context T.
CORES: Mapping[str, Callable[[deltanet_jax.ModelConfig, Any, int], float]] = {
  'attention': _attention,
  'sliding_window': _attention,
  'delta_net': _delta_net,
  'gated_delta_net': _gated_delta_net,
  'delta_product': _delta_product,
  'kimi_delta': _delta_net,
  'rwkv7': _rwkv7,
  'block_delta_net': _block_delta_net,
  'linear_attention': _linear_attention,
  'retnet': _retnet,
  'gla': _gla,
  'mamba2': _mamba2,
  'hgrn2': _linear(),
  'mlstm': _mlstm,
  'schlag': _schlag,
  'gated_rfa': _gated_rfa,
  'rwkv6': _linear(),
  'gsa': _gsa,
  'abc': _abc,
  'mamba': _mamba,
  'rwkv4': _rwkv4,
  'hyena': _hyena,
  'multihead_hyena': _multihead_hyena,
  'h3': _h3,
}


@functools.cache
def matmul_parameters(model: deltanet_jax.ModelConfig) -> int:
  """Returns the numbers N of the module that multiply every token's vector."""
  params = jax.eval_shape(lambda: deltanet_jax.init(model, jax.random.key(0)))
  total = model.vocab_size * model.model_width if model.tie_embeddings else 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    if _PRODUCT.search(name) and not _NO_PRODUCT.search(name):
      total += math.prod(leaf.shape)
  return total


def core_flops(
  model: deltanet_jax.ModelConfig, mixer: str, length: int
) -> float:
  """Returns core(mixer, T) of the module, of one layer.

  Args:
    model: the configuration, with the options of the mixer.
    mixer: a name of the registry.
    length: tokens T of a row.
  """
  return CORES[mixer](model, getattr(model, mixer), length)


def flops_per_token(model: deltanet_jax.ModelConfig, length: int) -> float:
  """Returns the model FLOPs of a training step per token; see the module.

  Args:
    model: the configuration.
    length: tokens T of a row.
  """
  period = sum(core_flops(model, name, length) for name in model.mixers)
  repeats = model.num_layers // len(model.mixers)
  return 6 * matmul_parameters(model) + repeats * period


def mfu(
  config: config_lib.TrainLMConfig,
  tokens_per_second: float,
  devices: Sequence[Any],
) -> float | None:
  """Returns the model FLOP/s as a share of the devices' peak in bfloat16.

  Args:
    config: of the run: the model and the length of its rows.
    tokens_per_second: of all devices together.
    devices: all of the run, of one kind.

  Returns:
    The share, 0 to 1; None for devices of an unknown peak, such as CPUs.
  """
  chip = chips.of_kind(devices[0].device_kind)
  if chip is None:
    return None
  per_token = flops_per_token(config.model, config.data.sequence_length)
  return tokens_per_second * per_token / (chip.peak_flops * len(devices))
