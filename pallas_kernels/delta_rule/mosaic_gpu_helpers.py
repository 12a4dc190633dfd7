"""What blocks of threads do that have no row, beside those of a Hopper kernel.

Where `mosaic_gpu_scan` leaves at least half of the GPU idle, these are in its
launch. They take chunk after chunk, of all rows, as these come to them, ahead
of the recurrence, and make what it copies, or behind it, and read what it
stores; a semaphore in device memory for each chunk says that it is there.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

_WARPGROUPS = 3  # Of a block of threads, as the scan has where it leaves room.
_FEWEST_REGISTERS = 24
# Chunks of which helpers are told at a time: to tell them takes a while.
PUBLISHED = 4


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
    work: (refs by name, find, copy_next) -> None: a task, up to where its
      scratch is free again. find() -> (scratch by name, the chunk's index in R
      N, the part) reads them from shared memory: of what it knows the compiler
      would keep all addresses in registers. copy_next() is to be called once,
      and does `copy` for the next task.
    copy: (refs by name, scratch by name, index) -> None: starts to copy what
      `work` waits for first, ahead of the scan; otherwise None.
    inputs: arrays by name, beside those of the scan.
    results: shapes and dtypes by name; those that the scan copies it waits for.
    scratch: of one task, by name, for a number of them at a time.
    ahead: of the scan; otherwise behind it.
    workers: warpgroups of a block that work.
    registers: of a thread of these.
    parts: tasks of a chunk.
    turns: tasks of a warpgroup behind the scan, where blocks follow each other;
      ahead of it each has its share.
  """

  work: Callable[..., None]
  copy: Callable[..., None] | None
  inputs: Mapping[str, jax.Array]
  results: Mapping[str, jax.ShapeDtypeStruct]
  scratch: Callable[[int], Mapping[str, Any]]
  ahead: bool
  workers: int
  registers: int
  parts: int = 1
  turns: int = 1


def turns(helpers: Helpers, sizes, count: int) -> int:
  """Returns how many tasks a warpgroup of `count` blocks of helpers has."""
  tasks = sizes.rows * sizes.chunks * helpers.parts
  return -(-tasks // (count * helpers.workers))


def take_tasks(
  helpers: Helpers, refs, number, made, sizes, count, own, reverse
) -> None:
  """What a block of helpers does.

  Args:
    helpers: what they do.
    refs: arrays in device memory by name.
    number: of the block among the helpers.
    made: semaphores [R N], or None.
    sizes: of the call.
    count: of blocks of helpers.
    own: scratch by name, and for each worker the place of its slot and task.
    reverse: the scan takes the chunks from the last to the first.
  """
  scratch, slots = own
  parts, rows, workers = helpers.parts, sizes.rows, helpers.workers
  tasks, own_turns = rows * sizes.chunks * parts, turns(helpers, sizes, count)
  group = lax.axis_index('warpgroup')
  if helpers.ahead:
    first, stride = number * workers + group, count * workers
  else:
    first, stride = number * own_turns * workers + group, workers

  def place(task):
    """Returns the row, the number of the chunk and the part of it."""
    row = lax.rem(lax.div(task, jnp.int32(parts)), jnp.int32(rows))
    number = lax.div(task, jnp.int32(rows * parts))
    return row, number, lax.rem(task, jnp.int32(parts))

  def index(row, number):
    chunk = sizes.chunks - 1 - number if reverse else number
    return row * sizes.chunks + chunk

  def find():
    slot, task = slots[group, 0], slots[group, 1]
    row, number, part = place(task)
    use = {name: ref.at[slot] for name, ref in scratch.items()}
    return use, index(row, number), part

  def wait_for(task):
    row, number, _ = place(task)
    last = number - lax.rem(number, jnp.int32(PUBLISHED)) + (PUBLISHED - 1)
    last = jnp.minimum(last, jnp.int32(sizes.chunks - 1))
    wait(made, index(row, last), sizes.value_blocks)

  def copy(task):
    use, *_ = find()
    row, number, _ = place(task)
    helpers.copy(refs, use, index(row, number))

  def copy_next(task):
    if helpers.copy:
      pl.when(task + stride < tasks)(lambda: copy(task + stride))

  def take(task):
    slots[group, 1] = task
    if not helpers.ahead:
      wait_for(task)
    helpers.work(refs, find, lambda: copy_next(task))

  def publish(task):
    row, number, _ = place(task)
    plgpu.wait_smem_to_gmem(0)
    signal(made, index(row, number))

  def step(turn, carry):
    task = first + turn * stride
    if helpers.ahead:
      last = task - stride
      pl.when((turn > 0) & (last < tasks))(lambda: publish(last))
    pl.when(task < tasks)(lambda: take(task))
    return carry

  def work():
    plgpu.set_max_registers(helpers.registers, action='increase')
    slots[group, 0], slots[group, 1] = group, first
    copy_next(first - stride)
    lax.fori_loop(0, own_turns + helpers.ahead, step, None)

  def rest():
    plgpu.set_max_registers(_FEWEST_REGISTERS, action='decrease')

  if workers == _WARPGROUPS:
    work()
  else:
    lax.cond(group < workers, work, rest)
