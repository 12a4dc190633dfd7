"""The frozen configuration of a language model."""

import dataclasses
import itertools
from typing import Literal

from deltanet_jax.layers import abc as abc_lib
from deltanet_jax.layers import attention as attention_lib
from deltanet_jax.layers import block_delta_net as block_delta_net_lib
from deltanet_jax.layers import delta_net as delta_net_lib
from deltanet_jax.layers import delta_product as delta_product_lib
from deltanet_jax.layers import gated_delta_net as gated_delta_net_lib
from deltanet_jax.layers import gated_rfa as gated_rfa_lib
from deltanet_jax.layers import gla as gla_lib
from deltanet_jax.layers import gsa as gsa_lib
from deltanet_jax.layers import h3 as h3_lib
from deltanet_jax.layers import hgrn2 as hgrn2_lib
from deltanet_jax.layers import hyena as hyena_lib
from deltanet_jax.layers import kimi_delta as kimi_delta_lib
from deltanet_jax.layers import linear_attention as linear_attention_lib
from deltanet_jax.layers import mamba as mamba_lib
from deltanet_jax.layers import mamba2 as mamba2_lib
from deltanet_jax.layers import mlstm as mlstm_lib
from deltanet_jax.layers import options
from deltanet_jax.layers import retnet as retnet_lib
from deltanet_jax.layers import rwkv4 as rwkv4_lib
from deltanet_jax.layers import rwkv6 as rwkv6_lib
from deltanet_jax.layers import rwkv7 as rwkv7_lib
from deltanet_jax.layers import schlag as schlag_lib

RematPolicy = Literal['none', 'dots', 'mixer', 'offload', 'full']


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder-only language model.

  Attributes:
    vocab_size: rows of the embedding.
    model_width: width D of the residual stream.
    num_layers: blocks, each a token mixer and an MLP.
    use_mlp: False: blocks are token mixers alone, as Mamba's.
    mixers: names of the token mixers (`deltanet_jax.mixers`), repeated over
      the depth: ('delta_net', 'sliding_window') alternates the two.
    num_heads: heads H of every mixer.
    head_dim: key and value width of a head; 0: model_width / num_heads.
    mlp_width: hidden width of the SwiGLU; 0: the next multiple of 256 at or
      above 8/3 model_width.
    tie_embeddings: the output projection is the transposed embedding.
    norm_eps: epsilon of every RMSNorm.
    dtype: dtype of the activations; parameters are float32.
    remat: what a block keeps for its backward pass, from most to least memory;
      the rest is recomputed. `none`: all that its gradient reads. `dots`: the
      results of its projections, of its recurrence (with what the GPU kernels
      of the delta rule find and name: inverses of chunks, states, norms, and
      the states at the ends of the parts of a row that devices share) and of
      cuDNN's attention. What it computes again is elementwise, which a GPU does
      faster than it stores and loads, and attention without cuDNN. `mixer`: the
      output of the mixer, the inputs of those kernels and what they find, so
      that neither they nor the MLP's input run twice, and those states.
      `offload`: the results of the projections, in the memory of the
      host. `full`: its input alone.
    scan_layers: the layers are turns of a loop, and a model of any depth is
      compiled as fast as one layer. False: they are written out, which compiles
      longer and trains faster: what a layer keeps for the backward pass is then
      not copied into an array of all layers, and from there again. The
      parameters are the same.
    delta_net: options of the `delta_net` mixer, and so on for all mixers.
  """

  vocab_size: int = 32_000
  model_width: int = 1024
  num_layers: int = 24
  use_mlp: bool = True
  mixers: tuple[str, ...] = ('delta_net',)
  num_heads: int = 8
  head_dim: int = 0
  mlp_width: int = 0
  tie_embeddings: bool = False
  norm_eps: float = 1e-6
  dtype: options.DType = 'bfloat16'
  remat: RematPolicy = 'none'
  scan_layers: bool = True
  attention: attention_lib.AttentionConfig = attention_lib.AttentionConfig()
  sliding_window: attention_lib.SlidingWindowConfig = (
    attention_lib.SlidingWindowConfig()
  )
  delta_net: delta_net_lib.DeltaNetConfig = delta_net_lib.DeltaNetConfig()
  gated_delta_net: gated_delta_net_lib.GatedDeltaNetConfig = (
    gated_delta_net_lib.GatedDeltaNetConfig()
  )
  delta_product: delta_product_lib.DeltaProductConfig = (
    delta_product_lib.DeltaProductConfig()
  )
  kimi_delta: kimi_delta_lib.KimiDeltaConfig = kimi_delta_lib.KimiDeltaConfig()
  rwkv7: rwkv7_lib.RWKV7Config = rwkv7_lib.RWKV7Config()
  block_delta_net: block_delta_net_lib.BlockDeltaNetConfig = (
    block_delta_net_lib.BlockDeltaNetConfig()
  )
  linear_attention: linear_attention_lib.LinearAttentionConfig = (
    linear_attention_lib.LinearAttentionConfig()
  )
  retnet: retnet_lib.RetNetConfig = retnet_lib.RetNetConfig()
  gla: gla_lib.GLAConfig = gla_lib.GLAConfig()
  mamba2: mamba2_lib.Mamba2Config = mamba2_lib.Mamba2Config()
  hgrn2: hgrn2_lib.HGRN2Config = hgrn2_lib.HGRN2Config()
  mlstm: mlstm_lib.MLSTMConfig = mlstm_lib.MLSTMConfig()
  schlag: schlag_lib.SchlagConfig = schlag_lib.SchlagConfig()
  gated_rfa: gated_rfa_lib.GatedRFAConfig = gated_rfa_lib.GatedRFAConfig()
  rwkv6: rwkv6_lib.RWKV6Config = rwkv6_lib.RWKV6Config()
  gsa: gsa_lib.GSAConfig = gsa_lib.GSAConfig()
  abc: abc_lib.ABCConfig = abc_lib.ABCConfig()
  mamba: mamba_lib.MambaConfig = mamba_lib.MambaConfig()
  rwkv4: rwkv4_lib.RWKV4Config = rwkv4_lib.RWKV4Config()
  hyena: hyena_lib.HyenaConfig = hyena_lib.HyenaConfig()
  multihead_hyena: hyena_lib.MultiheadHyenaConfig = (
    hyena_lib.MultiheadHyenaConfig()
  )
  h3: h3_lib.H3Config = h3_lib.H3Config()

  def __post_init__(self):
    options.require_at_least(
      self, 1, 'vocab_size', 'model_width', 'num_layers', 'num_heads'
    )
    options.require_at_least(self, 0, 'head_dim', 'mlp_width')
    options.require_choice(self, 'dtype', options.DType)
    options.require_choice(self, 'remat', RematPolicy)
    options.require_above(self, 0, 'norm_eps')
    if not self.mixers or self.num_layers % len(self.mixers):
      raise ValueError(
        'num_layers must be a multiple of the number of mixers, got '
        f'num_layers={self.num_layers} and mixers={self.mixers}'
      )
    options.resolve_head_dim(self.model_width, self.num_heads, self.head_dim)

  @property
  def resolved_head_dim(self) -> int:
    """Width of a head, with the default filled in."""
    return options.resolve_head_dim(
      self.model_width, self.num_heads, self.head_dim
    )

  @property
  def resolved_mlp_width(self) -> int:
    """Hidden width of the SwiGLU, with the default filled in."""
    return self.mlp_width or -(-8 * self.model_width // (3 * 256)) * 256

  @property
  def max_cached_tokens(self) -> int | None:
    """Tokens a row may have with a cache and nothing forgotten; None: any."""
    if 'attention' in self.mixers:
      return self.attention.cache_length
    return None

  @property
  def runs(self) -> tuple[tuple[str, int], ...]:
    """The period as (mixer, layers in a row); one layer if all are equal."""
    runs = itertools.groupby(self.mixers)
    runs = tuple((name, len(tuple(group))) for name, group in runs)
    return ((runs[0][0], 1),) if len(runs) == 1 else runs

  @property
  def num_repeats(self) -> int:
    """How often the period of `runs` is repeated over the depth."""
    return self.num_layers // sum(length for _, length in self.runs)
