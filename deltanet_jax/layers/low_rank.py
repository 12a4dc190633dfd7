"""A projection through few channels."""

from collections.abc import Callable

from flax import nnx
import jax

from deltanet_jax.layers import linear
from deltanet_jax.layers import options


class LowRank(nnx.Module):
  """y = f(x W_down) W_up (+ bias), with f elementwise."""

  def __init__(
    self,
    in_features: int,
    rank: int,
    out_features: int,
    *,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    use_bias: bool = False,
    dtype: options.DType = 'float32',
    rngs: nnx.Rngs,
  ):
    self.activation = activation
    self.down = linear.linear(in_features, rank, dtype=dtype, rngs=rngs)
    self.up = linear.linear(
      rank, out_features, use_bias=use_bias, dtype=dtype, rngs=rngs
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [..., in_features] to [..., out_features]."""
    y = self.down(x)
    return self.up(y if self.activation is None else self.activation(y))
