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

Where rows are so few that at least half of the GPU would be idle, the rest of
it can work beside them in the same launch, see `mosaic_gpu_helpers`. A block
waits only for blocks with lower numbers, which started before it, so that none
waits in vain on a GPU that has less room than the launch asks for; for others
it waits a while at most.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic_gpu_utils as utils
from pallas_kernels.delta_rule import mosaic_gpu_config as config_lib
from pallas_kernels.delta_rule import mosaic_gpu_helpers as helpers_lib
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout

_C = layout.CHUNK
_W = utils.TILE
# Registers of a thread for states, for results, for copies, by the number of
# warpgroups for states.
_REGISTERS = {1: (240, 208, 56), 2: (176, 136, 24)}
# What fits the shared memory where there are two.
_STAGES_OF_TWO = 2
_OF_KEYS = ('q', 'k')
_OF_VALUES = ('v', 'do', 'o')
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
    value_blocks: of v and o, fewer than those of a state that has more columns.
    reverse: chunks are taken from the last to the first.
    made: semaphores between rows and helpers, or None.
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
  value_blocks: int
  reverse: bool
  made: Any

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
  def has_values(self):
    """Whether its columns are among those of v and o."""
    return self.part < self.value_blocks

  @property
  def columns(self):
    """The slice of V, its columns of the state."""
    return layout.block(self.part)

  @property
  def values(self):
    """The slice of HV V, its columns of v and o; the last if it has none."""
    part = self.part
    if self.value_blocks < self.sizes.value_blocks:
      part = jnp.minimum(part, jnp.int32(self.value_blocks - 1))
    return layout.block(self.at.value * self.value_blocks + part)

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

  def leave(self, turned=False, **values):
    """Stores what the other warpgroup waits for, once it is free.

    Args:
      turned: store the transposes.
      **values: by name.
    """
    for name, value in values.items():
      self.wait_free(name)
      ref = self.left(name)
      if turned:
        ref = utils.transposed(ref)
      ref[...] = value
    plgpu.commit_smem()
    for name in values:
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

  def publish(self, number):
    """Says to helpers that what a chunk has in device memory is there."""
    helpers_lib.signal(self.made, self.index(number))

  def tell(self, number):
    """Says to helpers that a chunk is read; the first part does for all."""

    @pl.when(self.part == 0)
    def _():
      helpers_lib.tell(self.made, self.at.row, number, self.sizes)


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
    stores: how many of them `finish` starts for a chunk, if helpers read them.
    value_dim: of the values, if the state has more columns, V in `sizes`.
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
  stores: int = 0
  value_dim: int | None = None


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


def _results(block: Block, scan: Scan, helpers):
  """What the warpgroup for results does; helpers may wait for it."""
  is_read = helpers is not None and not helpers.ahead
  is_made = helpers is not None and helpers.ahead

  def begin(block):
    for name in scan.states_leave:
      block.free(name)

  def take(number, carry):
    scan.finish(block, number)
    if is_read:
      is_published = lax.rem(number, jnp.int32(helpers_lib.PUBLISHED)) == 0

      @pl.when((number > 0) & is_published)
      def _():
        # Stores take a while to arrive; those of the chunks before have.
        plgpu.wait_smem_to_gmem(scan.stores)
        block.publish(number - 1)

    if is_made:
      block.tell(number)
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
  if is_read:
    block.publish(block.sizes.chunks - 1)


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


def _copies(block: Block, stages, is_made: bool):
  """What the warpgroup for copies does; helpers may make what it copies."""
  full, free = block.barriers['full'], block.barriers['free']
  count = block.sizes.chunks

  def copy(number, carry):
    slot = block.slot(number)
    if is_made:
      helpers_lib.wait(block.made, block.index(number), 1)

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
    **{n: utils.shared(stages, _C, sizes.K) for n in (*_OF_KEYS, 'queries')},
    **{n: utils.shared(stages, groups, _C, _W) for n in _OF_VALUES},
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


def _row_blocks(sizes: layout.Sizes, groups: int) -> int:
  return sizes.rows * sizes.value_blocks // groups


def _take_row(scan: Scan, helpers, refs, number, made, sizes, scratch, groups):
  """What a block of threads with a row does, or with columns of one."""
  of_states, of_results, of_copies = _REGISTERS[groups]
  chunks, work, barriers = scratch
  splits = jnp.int32(sizes.value_blocks // groups)
  block = Block(
    refs=refs,
    chunks=chunks,
    work=work,
    barriers=barriers,
    at=layout.place(lax.div(number, splits), sizes),
    part=lax.rem(number, splits) * jnp.int32(groups),
    group=jnp.int32(0),
    groups=groups,
    common=scan.common,
    sizes=sizes,
    value_blocks=(scan.value_dim or sizes.V) // _W,
    reverse=scan.reverse,
    made=made,
  )
  group = lax.axis_index('warpgroup')

  @pl.when(group < groups)
  def _():
    plgpu.set_max_registers(of_states, action='increase')
    _states(block.of_group(group), scan)

  @pl.when(group == groups)
  def _():
    plgpu.set_max_registers(of_results, action='increase')
    _results(block, scan, helpers)

  @pl.when(group == groups + 1)
  def _():
    plgpu.set_max_registers(of_copies, action='decrease')
    _copies(block, chunks['k'].shape[0], helpers is not None and helpers.ahead)


def _body(scan: Scan, helpers, count, names, sizes, scratch, groups, made):
  """Returns the kernel's function.

  Args:
    scan: what blocks with a row do.
    helpers: what others do, or None.
    count: of these.
    names: of the kernel's arrays.
    sizes: of the call.
    scratch: of a block with a row.
    groups: its warpgroups for states.
    made: the type of the semaphores, or None.
  """
  rows = _row_blocks(sizes, groups)
  first_row = count if helpers and helpers.ahead else 0
  first_helper = 0 if helpers and helpers.ahead else rows

  def body(*refs):
    refs = dict(zip(names, refs, strict=True))
    semaphores = None if made is None else pl.get_global(made)
    number = lax.axis_index('block')

    def take_row(*scratch):
      at = number - first_row
      _take_row(scan, helpers, refs, at, semaphores, sizes, scratch, groups)

    def help_(scratch):
      helpers_lib.Block(
        helpers=helpers,
        refs=refs,
        scratch=scratch,
        made=semaphores,
        number=number - first_helper,
        count=count,
        sizes=sizes,
        reverse=scan.reverse,
      ).take_tasks()

    def with_row():
      pl.run_scoped(take_row, *scratch, collective_axes='warpgroup')

    def without_row():
      own = helpers_lib.scratch(helpers)
      pl.run_scoped(help_, own, collective_axes='warpgroup')

    if not helpers:
      with_row()
    else:
      # Not one `pl.when` after the other: the second would keep registers.
      has_row = (number >= first_row) & (number < first_row + rows)
      lax.cond(~has_row, without_row, with_row)

  return body


def run(
  scan: Scan,
  sizes: layout.Sizes,
  config,
  name: str,
  helpers: helpers_lib.Helpers | None = None,
) -> dict[str, jax.Array]:
  """Runs a kernel and returns its results by name, those of helpers too.

  Args:
    scan: what it does.
    sizes: of the call.
    config: gives stages, processors and how to interpret the kernel.
    name: of the kernel.
    helpers: what others do beside it, if `helper_blocks` are there.
  """
  groups = config_lib.state_groups(sizes, config)
  stages = min(config.stages, sizes.chunks)
  if groups > 1:
    stages = min(stages, _STAGES_OF_TWO)
  has_sums = sizes.gated and 'q' in scan.inputs
  copied = [*scan.inputs, *(['sums'] if has_sums else [])]
  inputs, results, count, made = dict(scan.inputs), dict(scan.results), 0, None
  if helpers:
    inputs |= helpers.inputs
    results |= helpers.results
    inputs = {name: x for name, x in inputs.items() if name not in results}
    count = config_lib.helper_blocks(sizes, config)
    if not helpers.ahead:
      count = helpers_lib.turns(helpers, sizes, helpers.turns)
    count = min(count, helpers_lib.turns(helpers, sizes, 1))
    if not config.interpret:  # It takes block after block.
      made = helpers_lib.semaphores(sizes)
  inputs['first'] = scan.first
  scratch = _scratch(scan, copied, sizes, stages, groups)
  found = plgpu.kernel(
    _body(
      scan,
      helpers,
      count,
      [*inputs, *results],
      sizes,
      scratch,
      groups,
      made,
    ),
    out_type=list(results.values()),
    grid=(_row_blocks(sizes, groups) + count,),
    grid_names=('block',),
    num_threads=groups + 2,
    thread_name='warpgroup',
    # Sums over columns are within quads of threads.
    compiler_params=plgpu.CompilerParams(
      approx_math=True, reduction_scratch_bytes=0
    ),
    interpret=config.interpret,
    kernel_name=name,
  )(*inputs.values())
  return dict(zip(results, found, strict=True))
