"""DeltaNet with block-diagonal generalised Householder transitions.

Yang et al., arXiv 2406.06484, name richer structured transitions as future
work. This is the block-diagonal one; there is no official code.

A key k of width K is cut into n blocks k^1 .. k^n of width K / n, each made a
unit vector of its own, with its own beta^j. The transition is

    A_t = Diag(I - beta^1 k^1 k^1^T, ..., I - beta^n k^n k^n^T),

a generalised Householder matrix in every block: of rank n away from the
identity where DeltaNet's is of rank 1, with eigenvalues 1 - beta^j in the n
orthogonal directions and 1 elsewhere, so it is as stable. The state's rows in
block j, S^j in R^{K/n x V}, see that block alone,

    S^j_t = (I - beta^j_t k^j_t k^j_t^T) S^j_{t-1} + beta^j_t k^j_t v_t^T
    o_t   = sum_j S^j_t^T q^j_t,

one gradient step on |S^j^T k^j_t - v_t|^2 per block: the value is stored under
each part of the key, and reading averages what the parts recall. That is n
delta rules of key width K / n with common values, whose outputs are summed,
and computed as that: state and projections of DeltaNet (but n beta a head), the
chunkwise products over narrower keys. n = 1 is DeltaNet.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import delta_net
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDeltaNetConfig(delta_net.DeltaNetConfig):
  """Options of the `block_delta_net` mixer: those of `delta_net` and one more.

  Attributes:
    num_blocks: blocks n that a key is cut into.
  """

  num_blocks: int = 2

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'num_blocks')


class BlockDeltaNet(delta_net.DeltaNet):
  """`DeltaNet` with n delta rules per head, over n parts of the key.

  State: H K V numbers, as [B, H n, K / n, V].
  """

  config_class = BlockDeltaNetConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    if self.head_dim % self.config.num_blocks:
      raise ValueError(
        'head_dim must be a multiple of num_blocks, got '
        f'{self.head_dim} and {self.config.num_blocks}'
      )
    super()._build(rngs)

  @property
  def _num_betas(self) -> int:
    return self.num_heads * self.config.num_blocks

  def empty_state(self, batch: int) -> jax.Array:
    """Returns zeros [B, H n, K / n, V]."""
    key_dim = self.head_dim // self.config.num_blocks
    return self._zeros(batch, self._num_betas, key_dim, self.head_dim)

  def _delta_rule(self, q, k, v, beta, past: recurrence.Past) -> jax.Array:
    blocks = self.config.num_blocks
    q, k = (
      self._split_heads(y, self._num_betas) for y in (q, k)
    )  # [B, T, H n, K / n]
    v = jnp.repeat(v, blocks, axis=2)
    o = super()._delta_rule(q, k, v, beta, past)
    o = o.reshape(*o.shape[:2], self.num_heads, blocks, -1)
    return jnp.sum(o, axis=3)  # [B, T, H, V]
