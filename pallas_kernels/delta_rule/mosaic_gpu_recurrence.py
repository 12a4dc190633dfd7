"""Kernel: the outputs, chunk after chunk.

With the state S that enters a chunk and the pair T of `mosaic_gpu_inverse`,

    X  = T (V - entry (K S))
    O  = scale (entry (Q S) + tril((Q K^T) . D) X)
    S <- keep S + K^T (exit X),

entry, exit, keep, D as in `pallas_kernels.decay`, 1 without decay. X, T and the
scores are taken as pairs of bfloat16: for nearly parallel keys the sums over X
cancel.

A block of threads has 64 columns of a row's state. Its warpgroups compute

    states    X and S, transposed, so that what is found is the left operand of
              the next product without leaving registers
    outputs   the scores, and O from the S and X that the first leaves in shared
              memory

and copy the chunks to shared memory, so that only what the next chunk needs is
computed one after the other.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout

_C = layout.CHUNK
_W = utils.TILE
# Registers of a thread for states, for outputs, for copies.
_REGISTERS = (240, 216, 24)


class _Block(NamedTuple):
  """What a block of threads works with.

  Attributes:
    refs: arrays in device memory by name.
    chunks: buffers of the copied chunks by name, `stages` of each.
    work: other scratch by name.
    barriers: by name; `full` and `free` are one for each stage, the others
      pass S and X from the states to the outputs and back.
    at: the row.
    columns: slice of V, its columns of the state.
    values: slice of HV V, its columns of v and o.
    sizes: of the call.
  """

  refs: Any
  chunks: Any
  work: Any
  barriers: Any
  at: layout.Place
  columns: Any
  values: Any
  sizes: layout.Sizes

  def slot(self, number):
    """Returns the stage of a chunk."""
    return lax.rem(number, jnp.int32(self.chunks['k'].shape[0]))


def _state_step(block, number, state):
  """Returns the transposed state, float32 [64, K], after a chunk."""
  slot, barriers, gated = block.slot(number), block.barriers, block.sizes.gated
  state_s, x_s = block.work['state'], block.work['x']
  part = state.astype(jnp.bfloat16)
  plgpu.barrier_wait(barriers['state_free'])
  state_s[...] = part
  plgpu.commit_smem()
  plgpu.barrier_arrive(barriers['state_ready'])
  plgpu.barrier_wait(barriers['full'].at[slot])
  k, v = block.chunks['k'].at[slot], block.chunks['v'].at[slot]
  values, read = utils.matmuls(
    [(utils.transposed(v), block.work['identity'])],
    [(part, utils.transposed(k))],
  )
  if gated:
    rows = block.chunks['rows'].at[slot]
    entry = utils.load_columns(rows.at[layout.ENTRY])
    read = read * utils.over_columns(entry, _W)
  errors = utils.split(values - read)
  inverse = layout.pair(block.chunks['inverse'].at[slot])
  inverse = utils.transposed_pair(inverse)
  x = utils.matmul(utils.split_products(errors, inverse))
  parts = utils.split(x)
  if gated:  # Loads are behind the next copy only if a commit is between.
    exit_ = utils.load_columns(rows.at[layout.EXIT])
    state = state * rows[layout.ENTRY, _C - 1]
  plgpu.barrier_wait(barriers['x_free'])
  x_s[...] = jnp.concatenate(parts, axis=0)
  plgpu.commit_smem()
  plgpu.barrier_arrive(barriers['x_ready'])
  if gated:
    parts = utils.split(x * utils.over_columns(exit_, _W))
  (state,) = utils.accumulate((state, [(parts[1], k), (parts[0], k)]))
  plgpu.barrier_arrive(barriers['free'].at[slot])
  return state


def _states(block):
  """What the warpgroup for states does."""
  at = block.at.row, block.columns
  first = plgpu.load(
    block.refs['first'].at[at], layout=utils.LAYOUT, optimized=False
  )
  plgpu.barrier_wait(block.barriers['constants'])

  def take(number, state):
    return _state_step(block, number, state)

  last = lax.fori_loop(0, block.sizes.chunks, take, utils.cast(first))
  block.refs['last'][at] = last
  for name in ('state_free', 'x_free'):
    plgpu.barrier_wait(block.barriers[name])


def _scores(block, slot):
  """Returns the pair tril((Q K^T) . D) of a chunk in registers."""
  q, k = block.chunks['q'].at[slot], block.chunks['k'].at[slot]
  scores = utils.matmul([(q, utils.transposed(k))])
  row, column = utils.indices(_C, _C)
  is_past = row >= column
  if not block.sizes.gated:
    return utils.split(utils.cast(jnp.where(is_past, scores, 0.0)))
  by_row = utils.load_rows(block.chunks['rows'].at[slot, layout.SUM])
  by_column = utils.load_columns(block.chunks['sums'].at[slot])
  return utils.split(scores * layout.decays(by_row, by_column, is_past))


def _output_step(block, number):
  """Stores the outputs of a chunk."""
  slot, barriers, work = block.slot(number), block.barriers, block.work
  plgpu.barrier_wait(barriers['full'].at[slot])
  scores = _scores(block, slot)
  plgpu.barrier_wait(barriers['state_ready'])
  q = block.chunks['q'].at[slot]
  o = utils.matmul([(q, utils.transposed(work['state']))])
  plgpu.barrier_arrive(barriers['state_free'])
  if block.sizes.gated:
    entry = utils.load_rows(block.chunks['rows'].at[slot, layout.ENTRY])
    o = o * utils.over_rows(entry, _W)
  plgpu.barrier_wait(barriers['x_ready'])
  x = utils.transposed_pair(layout.pair(work['x']))
  (o,) = utils.accumulate((o, utils.split_products(scores, x)))
  plgpu.barrier_arrive(barriers['x_free'])
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  work['o'][...] = (o * block.sizes.scale).astype(jnp.bfloat16)
  plgpu.commit_smem()
  plgpu.barrier_arrive(barriers['free'].at[slot])
  tokens = layout.block(number, _C)
  target = block.refs['o'].at[block.at.batch, tokens, block.values]
  plgpu.copy_smem_to_gmem(work['o'], target)


def _outputs(block):
  """What the warpgroup for outputs does."""
  for name in ('state_free', 'x_free'):
    plgpu.barrier_arrive(block.barriers[name])

  def take(number, carry):
    _output_step(block, number)
    return carry

  lax.fori_loop(0, block.sizes.chunks, take, None)
  plgpu.wait_smem_to_gmem(0)


def _source(block, name, number):
  """Returns the part of an input that belongs to a chunk."""
  refs, at, sizes = block.refs, block.at, block.sizes
  index, tokens = at.row * sizes.chunks + number, layout.block(number, _C)
  if name in ('q', 'k'):
    return refs[name].at[at.batch, tokens, layout.block(at.key, sizes.K)]
  if name == 'v':
    return refs['v'].at[at.batch, tokens, block.values]
  if name == 'sums':
    return refs['rows'].at[index, layout.SUM]
  return refs[name].at[index]


def _copies(block, stages):
  """What the warpgroup for copies does."""
  full, free = block.barriers['full'], block.barriers['free']
  plgpu.copy_gmem_to_smem(
    block.refs['identity'],
    block.work['identity'],
    block.barriers['constants'],
  )

  def copy(number, carry):
    slot = block.slot(number)

    @pl.when(number >= stages)
    def _():
      plgpu.barrier_wait(free.at[slot])

    for name, buffer in block.chunks.items():
      source = _source(block, name, number)
      plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])
    return carry

  def drain(number, carry):
    plgpu.barrier_wait(free.at[block.slot(number)])
    return carry

  count = block.sizes.chunks
  lax.fori_loop(0, count, copy, None)
  lax.fori_loop(max(0, count - stages), count, drain, None)


def _scratch(sizes, stages):
  """Returns buffers of chunks, other scratch and barriers, by name each."""
  chunks = {
    'q': utils.shared(stages, _C, sizes.K),
    'k': utils.shared(stages, _C, sizes.K),
    'v': utils.shared(stages, _C, _W),
    'inverse': utils.shared(stages, 2 * _C, _C),
  }
  if sizes.gated:
    chunks['rows'] = plgpu.SMEM((stages, sizes.lines, _C), jnp.float32)
    chunks['sums'] = plgpu.SMEM((stages, _C), jnp.float32)
  work = {
    'identity': utils.shared(_C, _C),
    'state': utils.shared(_W, sizes.K),
    'x': utils.shared(2 * _W, _C),
    'o': utils.shared(_C, _W),
  }
  names = 'state_ready', 'state_free', 'x_ready', 'x_free', 'constants'
  barriers = {name: plgpu.Barrier() for name in names}
  barriers |= {
    'full': plgpu.Barrier(num_arrivals=len(chunks), num_barriers=stages),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=stages),
  }
  return chunks, work, barriers


def _kernel(names, sizes, stages):
  """Returns the kernel's function; `names` are those of its arrays."""
  of_states, of_outputs, of_copies = _REGISTERS

  def kernel(*refs):
    *refs, chunks, work, barriers = refs
    number = lax.axis_index('block')
    splits = jnp.int32(sizes.value_blocks)
    at = layout.place(lax.div(number, splits), sizes)
    first = lax.rem(number, splits) * _W
    block = _Block(
      refs=dict(zip(names, refs, strict=True)),
      chunks=chunks,
      work=work,
      barriers=barriers,
      at=at,
      columns=pl.ds(first, _W),
      values=pl.ds(at.value * sizes.V + first, _W),
      sizes=sizes,
    )
    group = lax.axis_index('warpgroup')

    @pl.when(group == 0)
    def _():
      plgpu.set_max_registers(of_states, action='increase')
      _states(block)

    @pl.when(group == 1)
    def _():
      plgpu.set_max_registers(of_outputs, action='increase')
      _outputs(block)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(of_copies, action='decrease')
      _copies(block, stages)

  return kernel


def outputs(
  q, k, v, inverse, rows, first, sizes, *, config
) -> tuple[jax.Array, jax.Array]:
  """Returns (o [B, T, HV V] bfloat16, the last state [R, K, V] float32).

  Args:
    q: queries, see `mosaic_gpu_layout` for all but `first`.
    k: keys.
    v: values.
    inverse: pairs of all chunks.
    rows: strengths and decays.
    first: float32 [R, K, V], the state that enters.
    sizes: of the call.
    config: gives stages and how to interpret the kernel.
  """
  stages = min(config.stages, sizes.chunks)
  first = jnp.swapaxes(first, 1, 2)
  inputs = {'q': q, 'k': k, 'v': v, 'inverse': inverse, 'first': first}
  inputs['identity'] = jnp.eye(_C, dtype=jnp.bfloat16)
  if sizes.gated:
    inputs['rows'] = rows
  results = {
    'o': jax.ShapeDtypeStruct(v.shape, jnp.bfloat16),
    'last': jax.ShapeDtypeStruct(first.shape, jnp.float32),
  }
  o, last = plgpu.kernel(
    _kernel([*inputs, *results], sizes, stages),
    out_type=list(results.values()),
    scratch_types=list(_scratch(sizes, stages)),
    grid=(sizes.rows * sizes.value_blocks,),
    grid_names=('block',),
    num_threads=3,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=config.interpret,
    kernel_name='delta_rule_recurrence',
  )(*inputs.values())
  return o, jnp.swapaxes(last, 1, 2)
