"""Runs a Hopper kernel over the chunks of every row in order, one at a time.

A block of threads has a row and all columns of its state, or 64 of them where
there are so few rows that processors would be idle. One of its warpgroups
copies the chunks to shared memory, each of the others computes with 64 columns
of the state, which it keeps in float32 registers.
"""

from collections.abc import Callable, Mapping
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
_OF_KEYS = ('q', 'k')
_OF_VALUES = ('v', 'do')


class Here(NamedTuple):
  """Where a warpgroup is in a chunk."""

  group: Any  # its number among those of the block that compute
  index: Any  # of the chunk in R N
  batch: Any
  tokens: Any  # slice of T
  columns: Any  # slice of V, its columns of the state
  values: Any  # slice of HV V, its columns of v and o


class Scan(NamedTuple):
  """What a kernel does with the chunks.

  Attributes:
    step: (state, use, refs, work, here) -> state, for one chunk: the parts of
      the inputs by name, all arrays, the scratch.
    inputs: arrays by name. What belongs to a chunk is copied in, with `rows`
      also its line `sums` if there are decays and queries.
    mask: of the chunk's scores, or None. It lies in shared memory: one made of
      indices would take up registers through all chunks.
    results: shapes and dtypes by name.
    first: float32 [R, K, V], the state before the first chunk.
    last: name of the result that the state after the last chunk goes to.
    entering: name of the result that the bfloat16 state before every chunk
      goes to.
    work: scratch by name, beside `state`, where that state also is.
    reverse: chunks are taken from the last to the first.
  """

  step: Callable[..., jax.Array]
  inputs: Mapping[str, jax.Array]
  mask: jax.Array | None
  results: Mapping[str, jax.ShapeDtypeStruct]
  first: jax.Array
  last: str | None
  entering: str | None
  work: Mapping[str, Any]
  reverse: bool = False


def groups(sizes: layout.Sizes, processors: int) -> int:
  """Returns how many warpgroups of a block compute: of one row, or its part."""
  return 1 if 2 * sizes.rows <= processors else sizes.value_blocks


def _buffers(names, groups, stages, sizes):
  """Returns the scratch that chunks are copied to, by name."""
  values = utils.shared(stages, groups, _C, _W)
  buffers = {
    **{name: utils.shared(stages, _C, sizes.K) for name in _OF_KEYS},
    **{name: values for name in _OF_VALUES},
    'inverse': utils.shared(stages, 2 * _C, _C),
    'rows': plgpu.SMEM((stages, sizes.lines, _C), jnp.float32),
    'sums': plgpu.SMEM((stages, _C), jnp.float32),
  }
  return {name: buffers[name] for name in names}


def _sources(name, refs, at, chunk, first_block, groups, sizes):
  """Returns the parts of an input that belong to a chunk."""
  index, tokens = at.row * sizes.chunks + chunk, layout.block(chunk, _C)
  if name in _OF_KEYS:
    return [refs[name].at[at.batch, tokens, layout.block(at.key, sizes.K)]]
  if name in _OF_VALUES:
    start = at.value * sizes.V + first_block * _W
    blocks = [pl.ds(start + n * _W, _W) for n in range(groups)]
    return [refs[name].at[at.batch, tokens, columns] for columns in blocks]
  if name == 'sums':
    return [refs['rows'].at[index, layout.SUM]]
  return [refs[name].at[index]]


def _run_kernel(scan: Scan, names, groups, stages, registers, sizes):
  """Returns the kernel's function."""
  has_mask = scan.mask is not None
  arrays = [*scan.inputs, 'first', *(['mask'] if has_mask else [])]
  arrays += scan.results
  splits = sizes.value_blocks // groups

  def chunk_of(number):
    return sizes.chunks - 1 - number if scan.reverse else number

  def copy_in(refs, buffers, work, full, free, ready, at, first_block):
    if has_mask:
      plgpu.copy_gmem_to_smem(refs['mask'], work['mask'], ready)

    def copy(number, carry):
      slot = lax.rem(number, jnp.int32(stages))

      @pl.when(number >= stages)
      def _():
        plgpu.barrier_wait(free.at[slot])

      for name, buffer in buffers.items():
        sources = _sources(
          name, refs, at, chunk_of(number), first_block, groups, sizes
        )
        targets = [buffer.at[slot]]
        if name in _OF_VALUES:
          targets = [buffer.at[slot, n] for n in range(groups)]
        for source, target in zip(sources, targets, strict=True):
          plgpu.copy_gmem_to_smem(source, target, full.at[slot])
      return carry

    def drain(number, carry):
      plgpu.barrier_wait(free.at[lax.rem(number, jnp.int32(stages))])
      return carry

    lax.fori_loop(0, sizes.chunks, copy, None)
    lax.fori_loop(max(0, sizes.chunks - stages), sizes.chunks, drain, None)

  def compute(refs, buffers, work, full, free, ready, at, first_block, group):
    block = first_block + group
    columns = layout.block(block)
    state_s = work['state'].at[group]

    def take(number, state):
      chunk, slot = chunk_of(number), lax.rem(number, jnp.int32(stages))
      here = Here(
        group=group,
        index=at.row * sizes.chunks + chunk,
        batch=at.batch,
        tokens=layout.block(chunk, _C),
        columns=columns,
        values=pl.ds(at.value * sizes.V + block * _W, _W),
      )
      # What the last chunk stored must have left shared memory.
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      state_s[...] = state.astype(jnp.bfloat16)
      plgpu.commit_smem()
      if scan.entering:
        target = refs[scan.entering].at[here.index, :, columns]
        plgpu.copy_smem_to_gmem(state_s, target)
      plgpu.barrier_wait(full.at[slot])
      use = {name: buffer.at[slot] for name, buffer in buffers.items()}
      state = scan.step(state, use, refs, work, here)
      plgpu.barrier_arrive(free.at[slot])
      return state

    first = plgpu.load(
      refs['first'].at[at.row, :, columns],
      layout=utils.LAYOUT,
      optimized=False,
    )
    if has_mask:
      plgpu.barrier_wait(ready)
    state = lax.fori_loop(0, sizes.chunks, take, utils.cast(first))
    if scan.last:
      refs[scan.last][at.row, :, columns] = state
    plgpu.wait_smem_to_gmem(0)

  def kernel(*refs):
    *refs, buffers, work, full, free, ready = refs
    refs = dict(zip(arrays, refs, strict=True))
    number = lax.axis_index('block')
    at = layout.place(lax.div(number, jnp.int32(splits)), sizes)
    first_block = lax.rem(number, jnp.int32(splits)) * groups
    group = lax.axis_index('warpgroup')

    @pl.when(group < groups)
    def _():
      plgpu.set_max_registers(registers[0], action='increase')
      compute(refs, buffers, work, full, free, ready, at, first_block, group)

    @pl.when(group == groups)
    def _():
      plgpu.set_max_registers(registers[1], action='decrease')
      copy_in(refs, buffers, work, full, free, ready, at, first_block)

  return kernel


def run(scan: Scan, sizes: layout.Sizes, config, name: str) -> list[jax.Array]:
  """Runs a kernel and returns its results.

  Args:
    scan: what it does.
    sizes: of the call.
    config: gives stages, registers, processors and how to interpret it.
    name: of the kernel.
  """
  count = groups(sizes, config.processors)
  stages = min(config.stages, sizes.chunks)
  has_scores = 'q' in scan.inputs
  names = [*scan.inputs, *(['sums'] if sizes.gated and has_scores else [])]
  buffers = _buffers(names, count, stages, sizes)
  copies = len(buffers) + sum(count - 1 for n in names if n in _OF_VALUES)
  work = {'state': utils.shared(count, sizes.K, _W), **scan.work}
  masks = []
  if scan.mask is not None:
    work['mask'] = utils.shared(_C, _C)
    masks = [scan.mask.astype(jnp.bfloat16)]
  return plgpu.kernel(
    _run_kernel(scan, names, count, stages, config.registers, sizes),
    out_type=list(scan.results.values()),
    scratch_types=[
      buffers,
      work,
      plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
      plgpu.Barrier(num_arrivals=count, num_barriers=stages),
      plgpu.Barrier(),
    ],
    grid=(sizes.rows * sizes.value_blocks // count,),
    grid_names=('block',),
    num_threads=count + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=config.interpret,
    kernel_name=name,
  )(*scan.inputs.values(), scan.first, *masks)
