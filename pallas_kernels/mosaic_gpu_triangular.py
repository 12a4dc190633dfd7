"""The inverse of unit lower triangular blocks in a warpgroup's registers.

Each of the four warps has 16 rows of a tile in the layout of accumulators, and
so a block [16, 16]. Row j of X = (I + A)^-1 is done once those before it are
taken from it, and is then taken from those behind it:

    X <- X - a_j x_j,    j = 0, 1, .. 14,

with a_j column j of A and x_j row j of X. Threads hand each other both, in
float32, with neither shared memory nor a barrier between. As products of tiles
it is 72 of 64 x 16, for a warpgroup has all of its rows multiplied by the same
block.
"""

import jax
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jax.extend.mlir.dialects import math
from jax.extend.mlir.dialects import vector
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils

SIZE = 16
nvvm = mgpu.utils.nvvm  # It is not in `jax.extend`.
_WARP = 32
_ACROSS = 4  # Threads that share a row, each with two columns of eight.


def _constant(value):
  return mgpu.utils.c(value, ir.IntegerType.get_signless(32))


def _of_thread(x, thread):
  """Returns the float32 number that another thread of the warp has."""
  every, last = _constant(-1), _constant(_WARP - 1)
  return nvvm.shfl_sync(every, x, thread, last, nvvm.ShflKind.idx)


def _numbers(array):
  """Returns a thread's numbers by (row / 8, column / 8, the lower bit)."""
  registers = array.registers.flatten()

  def number(half, block, bit):
    return vector.extract(
      registers[2 * block + half],
      dynamic_position=[],
      static_position=ir.DenseI64ArrayAttr.get([bit]),
    )

  every = [(h, b, e) for h in range(2) for b in range(2) for e in range(2)]
  return {at: number(*at) for at in every}


def eliminate(_, a, x):
  """Returns (I + A)^-1; `x` are identities."""
  from_a, of_x = _numbers(a), _numbers(x)
  lane = arith.remui(mgpu.utils.thread_idx(), _constant(_WARP))
  across = arith.andi(lane, _constant(_ACROSS - 1))
  first = arith.subi(lane, across)
  for j in range(SIZE - 1):
    half, within = divmod(j, 8)
    holder, bit = divmod(within, 2)
    later = [h for h in range(2) if 8 * h + 7 > j]
    holds_column = arith.addi(first, _constant(holder))
    column = {
      h: arith.negf(_of_thread(from_a[h, half, bit], holds_column))
      for h in later
    }
    holds_row = arith.addi(across, _constant(_ACROSS * within))
    for b, e in [(b, e) for b in range(half + 1) for e in range(2)]:
      row = _of_thread(of_x[half, b, e], holds_row)
      for h in later:
        of_x[h, b, e] = math.fma(column[h], row, of_x[h, b, e])
  found = x.copy()
  pair = ir.VectorType.get((2,), ir.F32Type.get())
  registers = [
    vector.from_elements(pair, [of_x[h, b, 0], of_x[h, b, 1]])
    for b in range(2)
    for h in range(2)
  ]
  for at, register in zip(range(4), registers, strict=True):
    found.registers.flat[at] = register
  return found


def _eliminate_interpreted(a, x):
  """Returns what `eliminate` does, of arrays."""
  blocks = a.shape[0] // SIZE, SIZE, SIZE
  a, x = a.reshape(blocks), x.reshape(blocks)
  for j in range(SIZE - 1):
    x = x - a[:, :, j : j + 1] * x[:, j : j + 1]
  return x.reshape(-1, SIZE)


def inverse(a: jax.Array, *, interpreted: bool) -> jax.Array:
  """Returns (I + A)^-1 of blocks one above the other, float32 [64, 16].

  Args:
    a: strictly lower triangular blocks, float32 [64, 16], in registers.
    interpreted: whether the kernel is, which knows no threads.
  """
  row, column = utils.indices(utils.TILE, SIZE)
  is_diagonal = lax.rem(row, jnp.int32(SIZE)) == column
  eye = utils.cast(jnp.where(is_diagonal, 1.0, 0.0))
  if interpreted:
    return utils.cast(_eliminate_interpreted(a, eye))
  shape = plgpu.ShapeDtypeStruct(eye.shape, eye.dtype, layout=utils.LAYOUT)
  run = plgpu.inline_mgpu(
    arg_types=(utils.LAYOUT, utils.LAYOUT), return_type=shape
  )(eliminate)
  return run(a, eye)
