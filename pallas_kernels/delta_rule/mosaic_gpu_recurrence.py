"""Kernels: the recurrence over chunks, for its outputs or for the gradients.

With the state S that enters a chunk and the pair T of `mosaic_gpu_inverse`,

    X  = T (V - entry (K S))
    O  = scale (entry (Q S) + tril((Q K^T) . D) X)
    S <- keep S + K^T (exit X),

entry, exit, keep, D as in `pallas_kernels.decay`, 1 without decay. X, T and the
scores are taken as pairs of bfloat16: for nearly parallel keys the sums over X
cancel.

A block of threads has 64 columns of a row's state. One of its warpgroups finds
X and S, transposed, so that what is found is the left operand of the next
product without leaving registers. It leaves both in shared memory for another,
which makes the outputs, or stores S and X as the gradients' kernels read them.
So only what the next chunk needs is computed one after the other. The last
warpgroup copies the chunks to shared memory.
"""

from collections.abc import Callable
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
# Registers of a thread for states, for results, for copies.
_REGISTERS = (240, 216, 24)
# What the first leaves in shared memory, S and X. It is `ready`, then `free`.
_LEFT = ('state', 'x')


class _Block(NamedTuple):
  """What a block of threads works with.

  Attributes:
    refs: arrays in device memory by name.
    chunks: buffers of the copied chunks by name, `stages` of each.
    work: other scratch by name.
    barriers: by name; `full` and `free` are one for each stage.
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

  def wait_slot(self, name, slot):
    """Waits at the barrier of a stage."""
    plgpu.barrier_wait(self.barriers[name].at[slot])

  def arrive_slot(self, name, slot):
    """Arrives at the barrier of a stage."""
    plgpu.barrier_arrive(self.barriers[name].at[slot])

  def wait(self, name):
    """Waits at a barrier."""
    plgpu.barrier_wait(self.barriers[name])

  def arrive(self, name):
    """Arrives at a barrier."""
    plgpu.barrier_arrive(self.barriers[name])


class _Kernel(NamedTuple):
  """What distinguishes the two kernels.

  Attributes:
    name: of the kernel.
    inputs: what is copied by chunks, by name.
    results: shapes and dtypes by name.
    step: (block, slot, number) -> None, what the warpgroup for results does
      with a chunk.
    work: its scratch, by name.
  """

  name: str
  inputs: dict[str, jax.Array]
  results: dict[str, jax.ShapeDtypeStruct]
  step: Callable[..., None]
  work: dict[str, Any]


def _leave(block, name, value):
  """Stores what the warpgroup for results waits for."""
  block.wait(f'{name}_free')
  block.work[name][...] = value
  plgpu.commit_smem()
  block.arrive(f'{name}_ready')


def _errors(block, slot, state):
  """Returns (V - entry (K S))^T, float32 [64, C]; leaves S."""
  part = state.astype(jnp.bfloat16)
  _leave(block, 'state', part)
  block.wait_slot('full', slot)
  k, v = block.chunks['k'].at[slot], block.chunks['v'].at[slot]
  values, read = utils.matmuls(
    [(utils.transposed(v), block.work['identity'])],
    [(part, utils.transposed(k))],
  )
  if block.sizes.gated:
    entry = utils.load_columns(block.chunks['rows'].at[slot, layout.ENTRY])
    read = read * utils.over_columns(entry, _W)
  return values - read


def _state_step(block, number, state):
  """Returns the transposed state, float32 [64, K], after a chunk."""
  slot = block.slot(number)
  errors = utils.split(_errors(block, slot, state))
  inverse = layout.pair(block.chunks['inverse'].at[slot])
  inverse = utils.transposed_pair(inverse)
  x = utils.matmul(utils.split_products(errors, inverse))
  parts = written = utils.split(x)
  if block.sizes.gated:
    rows = block.chunks['rows'].at[slot]
    exit_ = utils.load_columns(rows.at[layout.EXIT])
    written = utils.split(x * utils.over_columns(exit_, _W))
    state = state * rows[layout.ENTRY, _C - 1]

  def leave():  # Commits, too, what orders the loads before the next copy.
    _leave(block, 'x', jnp.concatenate(parts, axis=0))

  k = block.chunks['k'].at[slot]
  products = [(written[1], k), (written[0], k)]
  (state,) = utils.accumulate((state, products), meanwhile=leave)
  block.arrive_slot('free', slot)
  return state


def _states(block):
  """What the warpgroup for states does."""
  at = block.at.row, block.columns
  first = plgpu.load(
    block.refs['first'].at[at], layout=utils.LAYOUT, optimized=False
  )
  block.wait('loaded')

  def take(number, state):
    return _state_step(block, number, state)

  last = lax.fori_loop(0, block.sizes.chunks, take, utils.cast(first))
  if 'last' in block.refs:
    block.refs['last'][at] = last
  for name in _LEFT:
    block.wait(f'{name}_free')


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


def _store_outputs(block, slot, number):
  """Stores the outputs of a chunk."""
  work, q = block.work, block.chunks['q'].at[slot]
  scores = _scores(block, slot)
  block.wait('state_ready')
  o = utils.matmul([(q, utils.transposed(work['state']))])
  block.arrive('state_free')
  if block.sizes.gated:
    entry = utils.load_rows(block.chunks['rows'].at[slot, layout.ENTRY])
    o = o * utils.over_rows(entry, _W)
  block.wait('x_ready')
  x = utils.transposed_pair(layout.pair(work['x']))
  (o,) = utils.accumulate((o, utils.split_products(scores, x)))
  block.arrive('x_free')
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  work['o'][...] = (o * block.sizes.scale).astype(jnp.bfloat16)
  plgpu.commit_smem()
  block.arrive_slot('free', slot)
  tokens = layout.block(number, _C)
  target = block.refs['o'].at[block.at.batch, tokens, block.values]
  plgpu.copy_smem_to_gmem(work['o'], target)


def _store_states(block, slot, number):
  """Stores the state that enters a chunk, and X."""
  work, identity = block.work, block.work['identity']
  index = block.at.row * block.sizes.chunks + number
  block.arrive_slot('free', slot)
  block.wait('state_ready')
  for part in range(block.sizes.key_blocks):
    keys = layout.block(part)
    state = utils.transposed(work['state'].at[:, keys])
    state = utils.matmul([(state, identity)])
    work['entering'].at[keys][...] = state.astype(jnp.bfloat16)
  plgpu.commit_smem()
  block.arrive('state_free')
  plgpu.copy_smem_to_gmem(
    work['entering'], block.refs['states'].at[index, :, block.columns]
  )
  block.wait('x_ready')
  parts = utils.matmuls(
    *([(utils.transposed(x), identity)] for x in layout.pair(work['x']))
  )
  work['x'][...] = jnp.concatenate(parts, axis=0).astype(jnp.bfloat16)
  plgpu.commit_smem()
  tokens = layout.block(number, _C)
  parts = layout.pair(work['x'])
  for name, part in zip(('x_high', 'x_low'), parts, strict=True):
    target = block.refs[name].at[block.at.batch, tokens, block.values]
    plgpu.copy_smem_to_gmem(part, target)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
  block.arrive('x_free')


def _results(block, step):
  """What the warpgroup for results does."""
  for name in _LEFT:
    block.arrive(f'{name}_free')
  block.wait('loaded')

  def take(number, carry):
    slot = block.slot(number)
    block.wait_slot('full', slot)
    step(block, slot, number)
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
  full, count = block.barriers['full'], block.sizes.chunks
  plgpu.copy_gmem_to_smem(
    block.refs['identity'], block.work['identity'], block.barriers['loaded']
  )

  def copy(number, carry):
    slot = block.slot(number)

    @pl.when(number >= stages)
    def _():
      block.wait_slot('free', slot)

    for name, buffer in block.chunks.items():
      source = _source(block, name, number)
      plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])
    return carry

  def drain(number, carry):
    block.wait_slot('free', block.slot(number))
    return carry

  lax.fori_loop(0, count, copy, None)
  lax.fori_loop(max(0, count - stages), count, drain, None)


def _scratch(copied, work, sizes, stages):
  """Returns buffers of chunks, other scratch and barriers, by name each."""
  chunks = {
    'q': utils.shared(stages, _C, sizes.K),
    'k': utils.shared(stages, _C, sizes.K),
    'v': utils.shared(stages, _C, _W),
    'inverse': utils.shared(stages, 2 * _C, _C),
    'rows': plgpu.SMEM((stages, sizes.lines, _C), jnp.float32),
    'sums': plgpu.SMEM((stages, _C), jnp.float32),
  }
  work = {'state': (_W, sizes.K), 'x': (2 * _W, _C), **work}
  work['identity'] = (_C, _C)
  barriers = {'loaded': plgpu.Barrier()}
  for name in _LEFT:
    barriers |= {
      f'{name}_ready': plgpu.Barrier(),
      f'{name}_free': plgpu.Barrier(),
    }
  barriers |= {
    'full': plgpu.Barrier(num_arrivals=len(copied), num_barriers=stages),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=stages),
  }
  chunks = {name: chunks[name] for name in copied}
  return chunks, {n: utils.shared(*s) for n, s in work.items()}, barriers


def _body(kernel, names, sizes, stages):
  """Returns the kernel's function; `names` are those of its arrays."""
  of_states, of_results, of_copies = _REGISTERS

  def body(*refs):
    *refs, chunks, work, barriers = refs
    number, splits = lax.axis_index('block'), jnp.int32(sizes.value_blocks)
    at = layout.place(lax.div(number, splits), sizes)
    start = lax.rem(number, splits) * _W
    block = _Block(
      refs=dict(zip(names, refs, strict=True)),
      chunks=chunks,
      work=work,
      barriers=barriers,
      at=at,
      columns=pl.ds(start, _W),
      values=pl.ds(at.value * sizes.V + start, _W),
      sizes=sizes,
    )
    group = lax.axis_index('warpgroup')

    @pl.when(group == 0)
    def _():
      plgpu.set_max_registers(of_states, action='increase')
      _states(block)

    @pl.when(group == 1)
    def _():
      plgpu.set_max_registers(of_results, action='increase')
      _results(block, kernel.step)

    @pl.when(group == 2)
    def _():
      plgpu.set_max_registers(of_copies, action='decrease')
      _copies(block, stages)

  return body


def _run(kernel, first, rows, sizes, config) -> list[jax.Array]:
  """Returns the results of a kernel."""
  stages = min(config.stages, sizes.chunks)
  inputs, copied = dict(kernel.inputs), list(kernel.inputs)
  if sizes.gated:
    inputs['rows'] = rows
    copied += ['rows', *(['sums'] if 'q' in copied else [])]
  inputs['first'] = jnp.swapaxes(first, 1, 2)
  inputs['identity'] = jnp.eye(_C, dtype=jnp.bfloat16)
  names = [*inputs, *kernel.results]
  return plgpu.kernel(
    _body(kernel, names, sizes, stages),
    out_type=list(kernel.results.values()),
    scratch_types=list(_scratch(copied, kernel.work, sizes, stages)),
    grid=(sizes.rows * sizes.value_blocks,),
    grid_names=('block',),
    num_threads=3,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=config.interpret,
    kernel_name=kernel.name,
  )(*inputs.values())


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
  last = (sizes.rows, sizes.V, sizes.K)
  kernel = _Kernel(
    name='delta_rule_recurrence',
    inputs={'q': q, 'k': k, 'v': v, 'inverse': inverse},
    results={
      'o': jax.ShapeDtypeStruct(v.shape, jnp.bfloat16),
      'last': jax.ShapeDtypeStruct(last, jnp.float32),
    },
    step=_store_outputs,
    work={'o': (_C, _W)},
  )
  o, last = _run(kernel, first, rows, sizes, config)
  return o, jnp.swapaxes(last, 1, 2)


def states(
  k, v, inverse, rows, first, sizes, *, config
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns (the states that enter each chunk, X_high, X_low).

  The arguments are those of `outputs`. The states are bfloat16 [R N, K, V],
  the parts of X bfloat16 [B, T, HV V].
  """
  entering = (sizes.rows * sizes.chunks, sizes.K, sizes.V)
  x = jax.ShapeDtypeStruct(v.shape, jnp.bfloat16)
  kernel = _Kernel(
    name='delta_rule_states',
    inputs={'k': k, 'v': v, 'inverse': inverse},
    results={
      'states': jax.ShapeDtypeStruct(entering, jnp.bfloat16),
      'x_high': x,
      'x_low': x,
    },
    step=_store_states,
    work={'entering': (sizes.K, _W)},
  )
  return tuple(_run(kernel, first, rows, sizes, config))
