"""The inverse of I + L for strictly lower triangular L, in plain XLA.

Diagonal blocks of 8 rows are inverted by forward substitution, neighbours are
then merged, doubling the block:

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]].

No power of L is ever formed: for keys that point the same way the powers grow
like binomial coefficients while the inverse stays of order one.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import chunking

_BLOCK = 8


def _substitute(lower):
  """Inverts I + lower [..., C, C] row by row, C small, unrolled.

  The batch lies in the last axis, where it fills the vector units.
  """
  size = lower.shape[-1]
  entries = jnp.moveaxis(lower.reshape(-1, size, size), 0, -1)  # [C, C, N]
  eye = jnp.eye(size, dtype=lower.dtype)
  rows = []
  for i in range(size):
    row = jnp.broadcast_to(eye[i, :, None], entries.shape[1:])
    for j in range(i):
      row = row - entries[i, j][None] * rows[j]
    rows.append(row)
  return jnp.moveaxis(jnp.stack(rows), -1, 0).reshape(lower.shape)


def _diagonal_blocks(matrix, block):
  """Returns the diagonal blocks [..., N, block, block] of [..., C, C]."""
  starts = range(0, matrix.shape[-1], block)
  blocks = [matrix[..., i : i + block, i : i + block] for i in starts]
  return jnp.stack(blocks, axis=-3)


def _inverse(lower):
  size = lower.shape[-1]
  block = min(_BLOCK, size)
  blocks = -(-size // block)
  padded = block * (1 << (blocks - 1).bit_length())
  pad = [(0, 0)] * (lower.ndim - 2) + [(0, padded - size)] * 2
  lower = jnp.pad(lower, pad) if padded > size else lower
  inverse = _substitute(_diagonal_blocks(lower, block))  # [..., N, 8, 8]
  while block < padded:
    first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    below = _diagonal_blocks(lower, 2 * block)[..., block:, :block]
    corner = -((second @ below) @ first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    lower_half = jnp.concatenate([corner, second], axis=-1)
    inverse = jnp.concatenate([upper, lower_half], axis=-2)
    block *= 2
  return inverse[..., 0, :size, :size]


def unit_lower_inverse(lower: jax.Array, *, exact: bool = True) -> jax.Array:
  """Returns (I + lower)^-1.

  Args:
    lower: strictly lower triangular [..., C, C], any C >= 1, float32 or
      float64.
    exact: compute in float64 and round. Where the condition number is in the
      thousands (beta near 2, nearly parallel keys), float32 would lose a dozen
      times what substitution row by row does.

  Returns:
    The inverse [..., C, C], unit lower triangular.
  """
  if not exact or lower.dtype == jnp.float64:
    return _inverse(lower)
  return chunking.in_float64(_inverse)(lower[None])[0]
