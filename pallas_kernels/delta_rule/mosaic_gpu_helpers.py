"""What blocks of threads do that have no row, beside those of a Hopper kernel.

Where `mosaic_gpu_scan` leaves at least half of the GPU idle, these are in its
launch. They take chunk after chunk, of all rows, as these come to them, ahead
of the recurrence, and make what it copies, or behind it, and read what it
stores; a semaphore in device memory for each chunk says that it is there.

Two warpgroups of such a block work. Behind the recurrence the third one waits
for it, and copies what they need next. Ahead of it that one stores what they
have found, and then says so; they are at their next chunks meanwhile. What is
too far ahead would have left the cache before it is read: there the third one
waits for the recurrence, but not for ever, as that may not run yet.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

_WORKERS = 2  # Warpgroups of a block that work; it has one more.
_REGISTERS = (240, 24)  # Of a thread of these, and of the last.
# Chunks of which rows tell at a time: that takes a while.
PUBLISHED = 4
# How often to look whether a row has come closer, about a microsecond each.
_LOOKS = 100


def signal(made, index):
  """Adds one to the semaphore of a chunk, if there are any."""
  if made is not None:
    plgpu.semaphore_signal(made.at[index], memory_scope='gpu')


def wait(made, index, count):
  """Waits until the semaphore of a chunk is at `count`, if there are any."""
  if made is not None:
    plgpu.semaphore_wait(
      made.at[index], count, decrement=False, memory_scope='gpu'
    )


class Helpers(NamedTuple):
  """What blocks of threads without a row do, a warpgroup for each task.

  Attributes:
    work: (refs by name, find) -> None: a task. find() -> (scratch by name, the
      chunk's index in R N, the part) reads them from shared memory: of what it
      knows the compiler would keep all addresses in registers. Ahead of the
      scan there is another argument, copy() -> None, to be called once: `copy`
      and `copy_next`.
    inputs: arrays by name, beside those of the scan.
    results: shapes and dtypes by name; those that the scan copies it waits for.
    scratch: of one task, by name, for a number of them at a time.
    twice: the same, which two tasks that follow each other have each. Ahead of
      the scan the barrier `full` is for what `copy_next` copies.
    copy_next: (refs by name, scratch by name, index) -> None, ahead of the
      scan: starts to copy what the next task waits for, to `twice`.
    copy: the same for the present task, from when the one before it is stored.
    store: the same: starts to store what is found. None behind the scan.
    fetch: (refs by name, scratch by name, index, part, turn) -> None, behind
      the scan: waits until there is room, and starts to copy what a task needs.
    drain: (scratch by name) -> None: waits until all of that is read.
    parts: tasks of a chunk.
    turns: tasks of a warpgroup behind the scan, where blocks follow each other;
      ahead of it each has its share.
  """

  work: Callable[..., None]
  inputs: Mapping[str, jax.Array]
  results: Mapping[str, jax.ShapeDtypeStruct]
  scratch: Callable[[int], Mapping[str, Any]]
  twice: Callable[[int], Mapping[str, Any]] = lambda count: {}
  copy_next: Callable[..., None] | None = None
  copy: Callable[..., None] | None = None
  store: Callable[..., None] | None = None
  fetch: Callable[..., None] | None = None
  drain: Callable[..., None] | None = None
  parts: int = 1
  turns: int = 1

  @property
  def ahead(self) -> bool:
    """Whether they are ahead of the scan."""
    return self.store is not None


class Scratch(NamedTuple):
  """Scratch of a block of helpers."""

  own: Any  # by name, for each worker
  twice: Any  # by name, two for each worker
  found: Any  # barriers, for each worker: it is there
  stored: Any  # the same: it is stored, and free again
  slots: Any  # int32 [workers, 3]: the places in `own` and `twice`, the task


def scratch(helpers: Helpers) -> Scratch:
  """Returns the scratch of a block of helpers."""
  return Scratch(
    own=helpers.scratch(_WORKERS),
    twice=helpers.twice(2 * _WORKERS),
    found=plgpu.Barrier(num_barriers=_WORKERS),
    stored=plgpu.Barrier(num_barriers=_WORKERS),
    slots=plgpu.SMEM((_WORKERS, 3), jnp.int32),
  )


def semaphores(sizes):
  """Returns the type of the semaphores: one for each chunk, and each row."""
  return plgpu.SemaphoreType.REGULAR((sizes.rows * (sizes.chunks + 1),))


def _of_row(row, sizes):
  """Returns the place of a row's semaphore, behind those of all chunks."""
  return sizes.rows * sizes.chunks + row


def tell(made, row, number, sizes):
  """Says to helpers ahead that a row has read a chunk, of some of them."""
  is_told = lax.rem(number, jnp.int32(PUBLISHED)) == PUBLISHED - 1
  pl.when(is_told)(lambda: signal(made, _of_row(row, sizes)))


def turns(helpers: Helpers, sizes, count: int) -> int:
  """Returns how many tasks a warpgroup of `count` blocks of helpers has."""
  tasks = sizes.rows * sizes.chunks * helpers.parts
  return -(-tasks // (count * _WORKERS))


class Block(NamedTuple):
  """A block of helpers.

  Attributes:
    helpers: what it does.
    refs: arrays in device memory by name.
    scratch: its scratch.
    made: semaphores, or None.
    number: of the block among the helpers.
    count: of these.
    sizes: of the call.
    reverse: the scan takes the chunks from the last to the first.
  """

  helpers: Helpers
  refs: Any
  scratch: Scratch
  made: Any
  number: Any
  count: int
  sizes: Any
  reverse: bool

  @property
  def last(self):
    """The last task of all."""
    return self.sizes.rows * self.sizes.chunks * self.helpers.parts - 1

  def tasks(self, worker):
    """Returns the first task of a worker, the step, and how many it has."""
    most = turns(self.helpers, self.sizes, self.count)
    first, step = self.number * _WORKERS + worker, self.count * _WORKERS
    if not self.helpers.ahead:
      first, step = self.number * most * _WORKERS + worker, _WORKERS
    left = lax.div(self.last - first + step, jnp.int32(step))
    return first, step, jnp.minimum(left, jnp.int32(most))

  def place(self, task):
    """Returns the row of a task, the number of the chunk and the part of it."""
    parts, rows = self.helpers.parts, self.sizes.rows
    row = lax.rem(lax.div(task, jnp.int32(parts)), jnp.int32(rows))
    number = lax.div(task, jnp.int32(rows * parts))
    return row, number, lax.rem(task, jnp.int32(parts))

  def index(self, row, number):
    """Returns the place of a chunk in R N."""
    chunk = self.sizes.chunks - 1 - number if self.reverse else number
    return row * self.sizes.chunks + chunk

  def index_of(self, task):
    """Returns the place of the chunk of a task in R N."""
    row, number, _ = self.place(task)
    return self.index(row, number)

  def use(self, worker, at):
    """Returns scratch of a worker by name, with what is at a place of `twice`.

    Args:
      worker: or what is in `slots`.
      at: place.
    """
    own, twice = self.scratch.own, self.scratch.twice
    return {name: ref.at[worker] for name, ref in own.items()} | {
      name: ref.at[at] for name, ref in twice.items()
    }

  def find(self, worker):
    """Returns what `Helpers.work` finds its task by, for a worker."""
    own, twice, task = (self.scratch.slots[worker, at] for at in range(3))
    row, number, part = self.place(task)
    return self.use(own, twice), self.index(row, number), part

  def wait_for(self, task):
    """Waits until the scan has stored the chunk of a task."""
    row, number, _ = self.place(task)
    last = number - lax.rem(number, jnp.int32(PUBLISHED)) + (PUBLISHED - 1)
    last = jnp.minimum(last, jnp.int32(self.sizes.chunks - 1))
    wait(self.made, self.index(row, last), self.sizes.value_blocks)

  def hold_back(self, task):
    """Waits while a task is too far ahead of its row."""
    if self.made is None:
      return
    row, number, _ = self.place(task)
    # Those that are worked on at a time, and those that it does not tell of.
    ahead = -(-self.count * _WORKERS // self.sizes.rows) + PUBLISHED
    told = lax.div(number - ahead, jnp.int32(PUBLISHED))
    semaphore = self.made.at[_of_row(row, self.sizes)]

    def is_ahead(found):
      looks, read = found
      return (read < told) & (looks < _LOOKS)

    def look(found):
      looks, _ = found
      return looks + 1, pl.semaphore_read(semaphore)

    lax.while_loop(is_ahead, look, (jnp.int32(0), jnp.int32(0)))

  def take_tasks(self):
    """Does the tasks of a block."""
    group = lax.axis_index('warpgroup')
    lax.cond(
      group < _WORKERS,
      lambda: _work(self, lax.axis_index('warpgroup')),
      lambda: _serve(self),
    )


def _twice(worker, turn):
  """Returns the place in `twice` of a worker's turn."""
  return 2 * worker + lax.rem(turn, jnp.int32(2))


def _work(block: Block, worker):
  """What a warpgroup that works does."""
  plgpu.set_max_registers(_REGISTERS[0], action='increase')
  block.scratch.slots[worker, 0] = worker
  work = _work_ahead if block.helpers.ahead else _work_behind
  work(block, worker)


def _begin(block: Block, worker, turn, task):
  """Returns the `find` of a task."""
  slots = block.scratch.slots
  if block.scratch.twice:
    slots[worker, 1] = _twice(worker, turn)
  slots[worker, 2] = task
  return functools.partial(block.find, worker)


def _work_behind(block: Block, worker):
  """Works behind the scan."""
  first, step, count = block.tasks(worker)

  def take(turn, carry):
    block.helpers.work(
      block.refs, _begin(block, worker, turn, first + turn * step)
    )
    return carry

  lax.fori_loop(0, count, take, None)
  plgpu.wait_smem_to_gmem(0)


def _work_ahead(block: Block, worker):
  """Works ahead of the scan."""
  helpers, refs, slots = block.helpers, block.refs, block.scratch.slots
  found, stored = (
    barriers.at[worker]
    for barriers in (block.scratch.found, block.scratch.stored)
  )
  first, step, count = block.tasks(worker)

  def copy_for(turn, task):
    use = block.use(slots[worker, 0], _twice(worker, turn))
    helpers.copy_next(refs, use, block.index_of(task))

  def copy(turn):
    plgpu.barrier_wait(stored)
    s, index, _ = block.find(worker)
    helpers.copy(refs, s, index)
    # At last another's, for nothing: a branch would serialise the products.
    following = first + (turn + 1) * step
    copy_for(turn + 1, jnp.minimum(following, block.last))

  def take(turn, carry):
    find = _begin(block, worker, turn, first + turn * step)
    helpers.work(refs, find, functools.partial(copy, turn))
    plgpu.wait_smem_to_gmem(0)  # What it has stored by itself.
    plgpu.barrier_arrive(found)
    return carry

  @pl.when(count > 0)
  def _():
    copy_for(jnp.int32(0), first)
    lax.fori_loop(0, count, take, None)
    plgpu.barrier_wait(stored)
    plgpu.barrier_wait(block.use(worker, _twice(worker, count))['full'])


def _in_turn(block: Block, serve):
  """Calls a function of a worker, its turn and its task, for all of these."""

  def take(turn, carry):
    def each(worker, carry):
      first, step, count = block.tasks(worker)
      pl.when(turn < count)(lambda: serve(worker, turn, first + turn * step))
      return carry

    return lax.fori_loop(0, _WORKERS, each, carry)

  _, _, most = block.tasks(jnp.int32(0))
  lax.fori_loop(0, most, take, None)


def _of_workers(block: Block, function):
  """Calls a function of a worker, for those that have a task."""

  def each(worker, carry):
    _, _, count = block.tasks(worker)
    pl.when(count > 0)(lambda: function(worker))
    return carry

  lax.fori_loop(0, _WORKERS, each, None)


def _serve(block: Block):
  """What the warpgroup that is left does."""
  plgpu.set_max_registers(_REGISTERS[1], action='decrease')
  (_store if block.helpers.ahead else _fetch)(block)


def _fetch(block: Block):
  """Copies for workers behind the scan."""

  def fetch(worker, turn, task):
    block.wait_for(task)
    row, number, part = block.place(task)
    use = block.use(worker, None)
    index = block.index(row, number)
    block.helpers.fetch(block.refs, use, index, part, turn)

  _in_turn(block, fetch)
  _of_workers(
    block, lambda worker: block.helpers.drain(block.use(worker, None))
  )


def _store(block: Block):
  """Stores for workers ahead of the scan."""
  found, stored = block.scratch.found, block.scratch.stored

  def store(worker, turn, task):
    index, use = block.index_of(task), block.use(worker, _twice(worker, turn))
    plgpu.barrier_wait(found.at[worker])
    block.helpers.store(block.refs, use, index)
    plgpu.wait_smem_to_gmem(0)
    signal(block.made, index)
    block.hold_back(task)
    plgpu.barrier_arrive(stored.at[worker])

  _of_workers(block, lambda worker: plgpu.barrier_arrive(stored.at[worker]))
  _in_turn(block, store)
