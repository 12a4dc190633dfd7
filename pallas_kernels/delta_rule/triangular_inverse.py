"""The inverse of I + L for strictly lower triangular L, in plain XLA.

Diagonal blocks of 32 rows are inverted by forward substitution, neighbours are
then merged, doubling the block:

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]].

No power of L is ever formed: for keys that point the same way the powers grow
like binomial coefficients while the inverse stays of order one.
"""

import functools

import jax
import jax.numpy as jnp

_BLOCK = 32


def _substitute(lower):
  """Inverts I + lower row by row; lower [..., C, C] with small C."""
  size = lower.shape[-1]
  eye = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
  rows = eye[..., :1, :]
  for i in range(1, size):
    known = jnp.sum(lower[..., i, :i, None] * rows, axis=-2, keepdims=True)
    rows = jnp.concatenate([rows, eye[..., i, None, :] - known], axis=-2)
  return rows


def _diagonal_blocks(matrix, block):
  """Returns the diagonal blocks [..., N, block, block] of [..., C, C]."""
  n = matrix.shape[-1] // block
  blocks = matrix.reshape(*matrix.shape[:-2], n, block, n, block)
  return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)


def unit_lower_inverse(lower: jax.Array) -> jax.Array:
  """Returns (I + lower)^-1.

  Args:
    lower: strictly lower triangular float32 [..., C, C], any C >= 1.

  Returns:
    The inverse [..., C, C], unit lower triangular.
  """
  size = lower.shape[-1]
  block = min(_BLOCK, size)
  blocks = -(-size // block)
  padded = block * (1 << (blocks - 1).bit_length())
  pad = [(0, 0)] * (lower.ndim - 2) + [(0, padded - size)] * 2
  lower = jnp.pad(lower, pad) if padded > size else lower
  dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  inverse = _substitute(_diagonal_blocks(lower, block))  # [..., N, 32, 32]
  while block < padded:
    first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    below = _diagonal_blocks(lower, 2 * block)[..., block:, :block]
    corner = -dot(dot(second, below), first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    lower_half = jnp.concatenate([corner, second], axis=-1)
    inverse = jnp.concatenate([upper, lower_half], axis=-2)
    block *= 2
  return inverse[..., 0, :size, :size]
