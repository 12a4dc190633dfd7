"""The channel mixer of a block."""

from flax import nnx
import jax

from deltanet_jax.layers import linear
from deltanet_jax.layers import options


class SwiGLU(nnx.Module):
  """y = (SiLU(x W_gate) * (x W_up)) W_down; Shazeer, arXiv 2002.05202."""

  def __init__(
    self,
    model_width: int,
    hidden_width: int,
    *,
    dtype: options.DType = 'float32',
    rngs: nnx.Rngs,
  ):
    self.gate = linear.linear(model_width, hidden_width, dtype=dtype, rngs=rngs)
    self.up = linear.linear(model_width, hidden_width, dtype=dtype, rngs=rngs)
    self.down = linear.linear(hidden_width, model_width, dtype=dtype, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x [..., D] to [..., D] in the layer's dtype."""
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
