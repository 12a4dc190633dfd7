"""What all token mixers have in common: arguments, sizes, checks."""

from typing import Any, ClassVar

from flax import nnx
import jax

from deltanet_jax.layers import linear
from deltanet_jax.layers import options


def _describe(cache):
  """Replaces arrays by their shape and dtype."""
  return jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', cache)


class Mixer(nnx.Module):
  """A token mixer: maps x [B, T, D] to y [B, T, D], causally.

  A subclass names its `config_class`, builds its parameters in `_build` and
  gives `init_cache` and `__call__`.
  """

  config_class: ClassVar[type]

  def __init__(
    self,
    model_width: int,
    num_heads: int,
    *,
    head_dim: int = 0,
    config: Any = None,
    norm_eps: float = 1e-6,
    dtype: options.DType = 'float32',
    rngs: nnx.Rngs,
  ):
    """Builds the layer.

    Args:
      model_width: width D of the input and the output.
      num_heads: heads H.
      head_dim: width of a head; 0: model_width / num_heads.
      config: options, of the class `config_class`; None: its defaults.
      norm_eps: epsilon of the norms inside.
      dtype: dtype of the activations; parameters are float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: a size or an option breaks a rule; head_dim=0 and the heads
        do not divide the width.
    """
    self.model_width = model_width
    self.num_heads = num_heads
    self.head_dim = options.resolve_head_dim(model_width, num_heads, head_dim)
    self.config = self.config_class() if config is None else config
    if not isinstance(self.config, self.config_class):
      raise ValueError(
        f'config must be a {self.config_class.__name__}, got {config!r}'
      )
    self.norm_eps = norm_eps
    self.dtype = dtype
    options.require_choice(self, 'dtype', options.DType)
    self._build(rngs)

  def _build(self, rngs: nnx.Rngs) -> None:
    raise NotImplementedError

  def _linear(self, out_features, rngs, in_features=None, use_bias=False):
    """Returns a projection, of the model's width where no other is given."""
    return linear.linear(
      in_features or self.model_width,
      out_features,
      use_bias=use_bias,
      dtype=self.dtype,
      rngs=rngs,
    )

  def init_cache(self, batch: int) -> Any:
    """Returns the cache of `batch` rows that have seen no token."""
    raise NotImplementedError

  def _check_call(self, x, segment_ids, cache) -> None:
    """Raises ValueError where the arguments of a call do not fit."""
    if x.ndim != 3 or x.shape[-1] != self.model_width:
      raise ValueError(
        f'x must be [B, T, {self.model_width}], got {tuple(x.shape)}'
      )
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
      raise ValueError(
        f'segment_ids must be [B, T] = {tuple(x.shape[:2])}, got '
        f'{tuple(segment_ids.shape)}'
      )
    if cache is None:
      return
    expected = _describe(jax.eval_shape(lambda: self.init_cache(x.shape[0])))
    got = _describe(cache)
    if expected != got:
      raise ValueError(
        f'cache must be what init_cache({x.shape[0]}) or an earlier call of '
        f'this mixer returned, {expected}, got {got}'
      )
