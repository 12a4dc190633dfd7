"""Runs a Hopper kernel over the chunks of every row in order, one at a time.

A block of threads has a row's state, or 64 columns of it: whichever keeps more
of the GPU busy. For every 64 columns one of its warpgroups finds what the next
chunk needs, with the state, transposed, in its float32 registers; what it finds
is the left operand of the next product without leaving them. Another makes the
results of it, and what needs no state. The last one copies the chunks to shared
memory.

Those for states and the one for results hand each other arrays in shared
memory. Each of these, `left` by one, is `ready` for the other until that has
made it `free` again.
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
# Registers of a thread for states, for results, for copies, by the number of
# warpgroups for states.
_REGISTERS = {1: (240, 216, 24), 2: (176, 136, 24)}
# What fits the shared memory where there are two.
_STAGES_OF_TWO = 2
_OF_KEYS = ('q', 'k')
_OF_VALUES = ('v', 'do')
NORMS = ('key_norms', 'query_norms')


class Block(NamedTuple):
  """What a block of threads works with, for 64 columns of a state.

  Attributes:
    refs: arrays in device memory by name.
    chunks: buffers of the copied chunks by name, `stages` of each.
    work: other scratch by name.
    barriers: by name; `full` and `free` are one for each stage.
    at: the row.
    part: the number of the 64 columns in the row.
    group: their number in the block of threads.
    groups: warpgroups for states that this has, each for 64 columns.
    common: names of what is left for all of these at once.
    sizes: of the call.
    reverse: chunks are taken from the last to the first.
  """

  refs: Any
  chunks: Any
  work: Any
  barriers: Any
  at: layout.Place
  part: Any
  group: Any
  groups: int
  common: tuple[str, ...]
  sizes: layout.Sizes
  reverse: bool

  def of_group(self, group):
    """Returns the one for other columns; this one must be for the first."""
    return self._replace(group=group, part=self.part + group)

  def each(self, function):
    """Calls a function of a `Block` for all columns; this is for the first."""

    def take(group, carry):
      function(self.of_group(group))
      return carry

    lax.fori_loop(0, self.groups, take, None)

  @property
  def columns(self):
    """The slice of V, its columns of the state."""
    return layout.block(self.part)

  @property
  def values(self):
    """The slice of HV V, its columns of v and o."""
    return pl.ds(self.at.value * self.sizes.V + self.part * _W, _W)

  def chunk(self, number):
    """Returns which chunk is taken as the one of that number."""
    return self.sizes.chunks - 1 - number if self.reverse else number

  def index(self, number):
    """Returns the place of a chunk in R N."""
    return self.at.row * self.sizes.chunks + self.chunk(number)

  def tokens(self, number):
    """Returns the slice of T that a chunk has."""
    return layout.block(self.chunk(number), _C)

  def use(self, number):
    """Returns the buffers of a chunk by name."""
    slot = self.slot(number)
    return {
      name: buffer.at[(slot, self.group) if name in _OF_VALUES else slot]
      for name, buffer in self.chunks.items()
    }

  def slot(self, number):
    """Returns the stage of a chunk."""
    return lax.rem(number, jnp.int32(self.chunks['k'].shape[0]))

  def wait_chunk(self, number):
    """Waits until a chunk is there."""
    plgpu.barrier_wait(self.barriers['full'].at[self.slot(number)])

  def free_chunk(self, number):
    """Says that this warpgroup no longer reads a chunk."""
    plgpu.barrier_arrive(self.barriers['free'].at[self.slot(number)])

  def _index(self, name):
    # Not a constant where that would not be lowered, see `utils.accumulate`.
    return self.group * jnp.int32(name not in self.common)

  def _barrier(self, name, state):
    return self.barriers[f'{name}_{state}'].at[self._index(name)]

  def left(self, name):
    """Returns what is left, or other scratch, in shared memory."""
    return self.work[name].at[self._index(name)]

  def leave(self, name, value):
    """Stores what the other warpgroup waits for, once it is free."""
    self.wait_free(name)
    self.left(name)[...] = value
    plgpu.commit_smem()
    plgpu.barrier_arrive(self._barrier(name, 'ready'))

  def wait(self, name):
    """Waits until the other warpgroup has left something."""
    plgpu.barrier_wait(self._barrier(name, 'ready'))

  def free(self, name):
    """Says that what the other warpgroup has left is no longer read."""
    plgpu.barrier_arrive(self._barrier(name, 'free'))

  def wait_free(self, name):
    """Waits until what this warpgroup has left is no longer read."""
    plgpu.barrier_wait(self._barrier(name, 'free'))


class Scan(NamedTuple):
  """What a kernel does with the chunks.

  Attributes:
    advance: (block, number, state) -> state, float32 [64, K]: what a warpgroup
      for states does with a chunk.
    finish: (block, number) -> None, what the one for results does with it, from
      waiting for it on; the `Block` is for the first columns.
    inputs: arrays by name. What belongs to a chunk is copied in, with `rows`
      also its line `sums` if there are decays and queries.
    results: shapes and dtypes by name; `last`, if it is there, gets the state
      after the last chunk, [R, V, K].
    first: float32 [R, V, K], the state before the first chunk.
    states_leave: shapes of what a warpgroup for states leaves, by name.
    results_leave: shapes of what the one for results leaves.
    common: those of the latter that it leaves for all columns at once.
    work: those of other scratch.
    reverse: chunks are taken from the last to the first.
    first_number: of the first call of `finish`; -1 if it prepares the next
      chunk.
  """

  advance: Callable[[Block, Any, jax.Array], jax.Array]
  finish: Callable[[Block, Any], None]
  inputs: Mapping[str, jax.Array]
  results: Mapping[str, jax.ShapeDtypeStruct]
  first: jax.Array
  states_leave: Mapping[str, tuple[int, ...]]
  results_leave: Mapping[str, tuple[int, ...]] = {}
  common: tuple[str, ...] = ()
  work: Mapping[str, tuple[int, ...]] = {}
  reverse: bool = False
  first_number: int = 0


def _states(block: Block, scan: Scan):
  """What a warpgroup for states does."""
  for name in scan.results_leave:
    block.free(name)
  at = block.at.row, block.columns
  first = plgpu.load(
    block.refs['first'].at[at], layout=utils.LAYOUT, optimized=False
  )

  def take(number, state):
    return scan.advance(block, number, state)

  last = lax.fori_loop(0, block.sizes.chunks, take, utils.cast(first))
  if 'last' in block.refs:
    block.refs['last'][at] = last
  for name in scan.states_leave:
    block.wait_free(name)


def _results(block: Block, scan: Scan):
  """What the warpgroup for results does."""

  def begin(block):
    for name in scan.states_leave:
      block.free(name)

  def take(number, carry):
    scan.finish(block, number)
    return carry

  def end(block):
    for name in scan.results_leave:
      if name not in scan.common:
        block.wait_free(name)

  block.each(begin)
  lax.fori_loop(scan.first_number, block.sizes.chunks, take, None)
  block.each(end)
  for name in scan.common:
    block.wait_free(name)
  plgpu.wait_smem_to_gmem(0)


def _source(block: Block, name, number):
  """Returns the part of an input that belongs to a chunk."""
  refs, at, sizes = block.refs, block.at, block.sizes
  index, tokens = block.index(number), block.tokens(number)
  if name in _OF_KEYS:
    return refs[name].at[at.batch, tokens, layout.block(at.key, sizes.K)]
  if name in _OF_VALUES:
    return refs[name].at[at.batch, tokens, block.values]
  if name == 'sums':
    return refs['rows'].at[index, layout.SUM]
  return refs[name].at[index]


def _copies(block: Block, stages):
  """What the warpgroup for copies does."""
  full, free = block.barriers['full'], block.barriers['free']
  count = block.sizes.chunks

  def copy(number, carry):
    slot = block.slot(number)

    @pl.when(number >= stages)
    def _():
      plgpu.barrier_wait(free.at[slot])

    for name in block.chunks:
      for group in range(block.groups if name in _OF_VALUES else 1):
        part = block.of_group(group)
        source, target = _source(part, name, number), part.use(number)[name]
        plgpu.copy_gmem_to_smem(source, target, full.at[slot])
    return carry

  def drain(number, carry):
    plgpu.barrier_wait(free.at[block.slot(number)])
    return carry

  lax.fori_loop(0, count, copy, None)
  lax.fori_loop(max(0, count - stages), count, drain, None)


def _scratch(scan: Scan, copied, sizes, stages, groups):
  """Returns buffers of chunks, other scratch and barriers, by name each."""
  chunks = {
    **{name: utils.shared(stages, _C, sizes.K) for name in _OF_KEYS},
    **{name: utils.shared(stages, groups, _C, _W) for name in _OF_VALUES},
    'inverse': utils.shared(stages, 3 * _C, layout.HALF, tile=layout.HALF),
    'rows': plgpu.SMEM((stages, sizes.lines, _C), jnp.float32),
    **{n: plgpu.SMEM((stages, _C), jnp.float32) for n in ('sums', *NORMS)},
  }
  left = {**scan.states_leave, **scan.results_leave}
  counts = {name: 1 if name in scan.common else groups for name in left}
  counts |= dict.fromkeys(scan.work, groups)
  copies = sum(groups if name in _OF_VALUES else 1 for name in copied)
  barriers = {
    'full': plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    'free': plgpu.Barrier(num_arrivals=groups + 1, num_barriers=stages),
  }
  for name in left:
    count = counts[name]
    barriers[f'{name}_ready'] = plgpu.Barrier(num_barriers=count)
    barriers[f'{name}_free'] = plgpu.Barrier(
      num_arrivals=groups // count, num_barriers=count
    )
  work = {**left, **scan.work}
  return (
    {name: chunks[name] for name in copied},
    {name: utils.shared(counts[name], *work[name]) for name in work},
    barriers,
  )


def _body(scan: Scan, names, sizes, stages, groups):
  """Returns the kernel's function; `names` are those of its arrays."""
  of_states, of_results, of_copies = _REGISTERS[groups]

  def body(*refs):
    *refs, chunks, work, barriers = refs
    number = lax.axis_index('block')
    splits = jnp.int32(sizes.value_blocks // groups)
    block = Block(
      refs=dict(zip(names, refs, strict=True)),
      chunks=chunks,
      work=work,
      barriers=barriers,
      at=layout.place(lax.div(number, splits), sizes),
      part=lax.rem(number, splits),  # 0 where there are more groups than one.
      group=jnp.int32(0),
      groups=groups,
      common=scan.common,
      sizes=sizes,
      reverse=scan.reverse,
    )
    group = lax.axis_index('warpgroup')

    @pl.when(group < groups)
    def _():
      plgpu.set_max_registers(of_states, action='increase')
      _states(block.of_group(group), scan)

    @pl.when(group == groups)
    def _():
      plgpu.set_max_registers(of_results, action='increase')
      _results(block, scan)

    @pl.when(group == groups + 1)
    def _():
      plgpu.set_max_registers(of_copies, action='decrease')
      _copies(block, stages)

  return body


def state_groups(sizes: layout.Sizes, config) -> int:
  """Returns how many warpgroups for states a block of threads has.

  One for the whole row, if blocks for 64 columns were more than processors: two
  that share what is copied and the matrices within a chunk take less time than
  two blocks after each other.
  """
  if sizes.rows * sizes.value_blocks <= config.processors:
    return 1
  return sizes.value_blocks


def run(scan: Scan, sizes: layout.Sizes, config, name: str) -> list[jax.Array]:
  """Runs a kernel and returns its results.

  Args:
    scan: what it does.
    sizes: of the call.
    config: gives stages, processors and how to interpret the kernel.
    name: of the kernel.
  """
  groups = state_groups(sizes, config)
  stages = min(config.stages, sizes.chunks)
  if groups > 1:
    stages = min(stages, _STAGES_OF_TWO)
  has_sums = sizes.gated and 'q' in scan.inputs
  copied = [*scan.inputs, *(['sums'] if has_sums else [])]
  names = [*scan.inputs, 'first', *scan.results]
  return plgpu.kernel(
    _body(scan, names, sizes, stages, groups),
    out_type=list(scan.results.values()),
    scratch_types=list(_scratch(scan, copied, sizes, stages, groups)),
    grid=(sizes.rows * sizes.value_blocks // groups,),
    grid_names=('block',),
    num_threads=groups + 2,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=config.interpret,
    kernel_name=name,
  )(*scan.inputs.values(), scan.first)
