"""The frozen configuration of a language model."""

import dataclasses
import typing
from typing import Any, Literal

FeatureMap = Literal['silu', 'relu', 'elu_plus_one', 'identity']
QKNorm = Literal['l2', 'l1']
DType = Literal['bfloat16', 'float32']
RematPolicy = Literal['none', 'dots', 'full']


def _require_at_least(config: Any, minimum: int, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    if value < minimum:
      raise ValueError(f'{name} must be at least {minimum}, got {value}')


def _require_choice(config: Any, name: str, choices: Any) -> None:
  value, known = getattr(config, name), typing.get_args(choices)
  if value not in known:
    raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig:
  """Options of the `delta_net` mixer; the defaults are the paper's.

  Attributes:
    use_short_conv: causal depthwise convolution after the q, k, v projections.
    conv_width: taps of that convolution.
    feature_map: map of q and k before their normalisation.
    qk_norm: `l2`, or `l1` (division by the sum of the absolute values).
    allow_negative_eigenvalues: beta in (0, 2) instead of (0, 1).
    use_output_gate: multiply the normalised output by SiLU of a projection.
    chunk_size: chunk of the chunkwise form; 0: the implementation's choice.
    implementation: see `pallas_kernels.delta_rule`; empty: automatic.
  """

  use_short_conv: bool = True
  conv_width: int = 4
  feature_map: FeatureMap = 'silu'
  qk_norm: QKNorm = 'l2'
  allow_negative_eigenvalues: bool = False
  use_output_gate: bool = False
  chunk_size: int = 0
  implementation: str = ''

  def __post_init__(self):
    _require_at_least(self, 1, 'conv_width')
    _require_at_least(self, 0, 'chunk_size')
    _require_choice(self, 'feature_map', FeatureMap)
    _require_choice(self, 'qk_norm', QKNorm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """A decoder-only language model.

  Attributes:
    vocab_size: rows of the embedding.
    model_width: width D of the residual stream.
    num_layers: blocks, each a token mixer and an MLP.
    mixers: names of the token mixers (`deltanet_jax.mixers`), repeated over
      the depth: ('delta_net', 'sliding_window') alternates the two.
    num_heads: heads H of every mixer.
    head_dim: key and value width of a head; 0: model_width / num_heads.
    mlp_width: hidden width of the SwiGLU; 0: the next multiple of 256 at or
      above 8/3 model_width.
    tie_embeddings: the output projection is the transposed embedding.
    norm_eps: epsilon of every RMSNorm.
    dtype: dtype of the activations; parameters are float32.
    remat: what a block's backward pass recomputes: `none` nothing, `dots`
      everything but matrix products, `full` everything.
    delta_net: options of the `delta_net` mixer.
  """

  vocab_size: int = 32_000
  model_width: int = 1024
  num_layers: int = 24
  mixers: tuple[str, ...] = ('delta_net',)
  num_heads: int = 8
  head_dim: int = 0
  mlp_width: int = 0
  tie_embeddings: bool = False
  norm_eps: float = 1e-6
  dtype: DType = 'bfloat16'
  remat: RematPolicy = 'none'
  delta_net: DeltaNetConfig = DeltaNetConfig()

  def __post_init__(self):
    _require_at_least(
      self, 1, 'vocab_size', 'model_width', 'num_layers', 'num_heads'
    )
    _require_at_least(self, 0, 'head_dim', 'mlp_width')
    _require_choice(self, 'dtype', DType)
    _require_choice(self, 'remat', RematPolicy)
    if self.norm_eps <= 0:
      raise ValueError(f'norm_eps must be above 0, got {self.norm_eps}')
    if not self.mixers or self.num_layers % len(self.mixers):
      raise ValueError(
        'num_layers must be a multiple of the number of mixers, got '
        f'num_layers={self.num_layers} and mixers={self.mixers}'
      )
    if not self.head_dim and self.model_width % self.num_heads:
      raise ValueError(
        'with head_dim=0, model_width must be a multiple of num_heads, got '
        f'model_width={self.model_width} and num_heads={self.num_heads}; '
        'otherwise set head_dim'
      )

  @property
  def resolved_head_dim(self) -> int:
    """Width of a head, with the default filled in."""
    return self.head_dim or self.model_width // self.num_heads

  @property
  def resolved_mlp_width(self) -> int:
    """Hidden width of the SwiGLU, with the default filled in."""
    return self.mlp_width or -(-8 * self.model_width // (3 * 256)) * 256

  @property
  def num_repeats(self) -> int:
    """How often the period of mixers is repeated over the depth."""
    return self.num_layers // len(self.mixers)
