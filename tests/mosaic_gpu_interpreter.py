"""Fills gaps in JAX's interpreter of Mosaic GPU kernels, for tests.

Added, in jax 0.11.2 to 0.12.0.1, where the interpreter has none of it:

* `plgpu.wgmma` with its left operand in registers;
* `pl.run_state` with accumulators;
* race checks of what `plgpu.wgmma` reads. It reads by the async proxy: stores
  to shared memory must be committed, copies to it waited for.

Products stay synchronous, so that a missing wait for one is not found.

The interpreter blocks threads of XLA's CPU backend while a kernel waits at a
barrier; with fewer threads than warpgroups it hangs. The eight CPU devices of
`conftest.py` give it enough.
"""

import functools
import types

import jax
from jax._src import callback
from jax._src.pallas import primitives as pallas_primitives
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret
from jax._src.state import discharge
from jax._src.state import types as state_types
from jax.experimental.pallas import mosaic_gpu as plgpu
import numpy as np

_Interpreter = jaxpr_interpret.JaxprInterpreter


def _is_ref(variable) -> bool:
  return isinstance(variable.aval, state_types.AbstractRef)


def _resolved(transforms):
  return jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))


def _check_read(thread, key, transforms, source_info) -> None:
  """Records a read by the async proxy, if races are looked for."""
  shared = gpu_callbacks._get_shared_memory()
  if not shared.detect_races:
    return
  key = gpu_callbacks.HostAllocationKey.from_array(key)
  with shared.lock:
    shared.clocks[thread].inc(shared.vector_clock_size - 1)
    clock = shared.clocks[thread].copy()
  gpu_callbacks.get_races().check_read(
    thread,
    clock.async_smem_clock.copy(),
    key,
    shared.access(key, _resolved(transforms)),
    source_info=source_info,
  )


@gpu_callbacks.fail_on_exception
def _multiply(
  *, token, mesh_location, thread, acc, acc_t, a, b, b_t, source_info=None
):
  """Adds a b to an accumulator, a from registers."""
  shared = gpu_callbacks._get_shared_memory()
  _check_read(thread, b, b_t, source_info)
  log = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
  key_of = gpu_callbacks.HostAllocationKey.from_array
  acc, b = key_of(acc), key_of(b)
  b_value, *_ = shared.get_buffer_content(
    b, shared.access(b, _resolved(b_t)), thread, logging_info=log
  )
  where = shared.access(acc, _resolved(acc_t))
  value, *_ = shared.get_buffer_content(acc, where, thread, logging_info=log)
  value = value + np.matmul(np.asarray(a), b_value, dtype=value.dtype)
  shared.store_buffer_content(acc, where, value, thread, logging_info=log)
  return token


def _interpret_wgmma(original, self, eqn, token, get_invals):
  if _is_ref(eqn.invars[1]):
    return original(self, eqn, token, get_invals)
  acc, a, b, *leaves = get_invals()
  trees = [
    eqn.params[f'{name}_transforms_tree'] or jax.tree.structure([])
    for name in ('acc', 'a', 'b')
  ]
  acc_t, _, b_t = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
  acc, acc_t = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, acc_t)
  b, b_t = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_t)
  token = callback.io_callback(
    functools.partial(_multiply, source_info=eqn.source_info),
    gpu_callbacks.TOKEN_SHAPE_DTYPE,
    token=token,
    mesh_location=self.mesh_location,
    thread=self.thread,
    acc=acc,
    acc_t=acc_t,
    a=a,
    b=b,
    b_t=b_t,
  )
  return token, []


def _allocate(self, eqn, token, value):
  """Returns (token, key) of a new accumulator."""
  space = gpu_callbacks.memory.get_memory_space_idx(
    mosaic_core.MemorySpace.REGS
  )
  token, request = gpu_callbacks.call_make_allocation_request_array(
    token=token,
    compute_unit=self.thread,
    memory_space_id=space,
    initial_ref_count=1,
  )
  return gpu_callbacks.call_allocate_buffer(
    token=token,
    mesh_location=self.mesh_location,
    thread=self.thread,
    allocation_request_as_array=request,
    value=value,
    source_info=eqn.source_info,
  )


def _read_and_free(self, eqn, token, key, aval):
  """Returns (token, value) of an accumulator."""
  token, value = callback.io_callback(
    functools.partial(
      gpu_callbacks.wgmma_accumulator_deref, source_info=eqn.source_info
    ),
    (gpu_callbacks.TOKEN_SHAPE_DTYPE, aval),
    token=token,
    mesh_location=self.mesh_location,
    thread=self.thread,
    acc_allocation_key_as_array=key,
    wait_n=0,
  )
  token = gpu_callbacks.call_deallocate_buffer(
    token=token,
    mesh_location=self.mesh_location,
    thread=self.thread,
    allocation_key_as_array=key,
    source_info=eqn.source_info,
  )
  return token, value


def _interpret_run_state(self, eqn, token, invals):
  """Runs `run_state`; refs that it closes over are passed through."""
  keys = []
  for variable, value in zip(eqn.invars, invals, strict=True):
    if not _is_ref(variable):
      token, value = _allocate(self, eqn, token, value)
    keys.append(value)
  token, _ = self.interpret(eqn.params['jaxpr'], token, *keys)
  results = []
  for variable, result, key in zip(eqn.invars, eqn.outvars, keys, strict=True):
    if not _is_ref(variable):
      token, key = _read_and_free(self, eqn, token, key, result.aval)
    results.append(key)
  return token, results


class _RunScopedOrState:
  """Equal to both primitives: `match` compares with it."""

  def __eq__(self, other):
    return other in (pallas_primitives.run_scoped_p, discharge.run_state_p)

  def __hash__(self):
    return hash('run_scoped or run_state')


class _Primitives:
  """The module of primitives, where run_scoped also stands for run_state."""

  run_scoped_p = _RunScopedOrState()

  def __init__(self, module):
    self._module = module

  def __getattr__(self, name):
    return getattr(self._module, name)


def _with_globals(function, **changed):
  """Returns a function that sees other globals."""
  copy = types.FunctionType(
    function.__code__,
    function.__globals__ | changed,
    function.__name__,
    function.__defaults__,
    function.__closure__,
  )
  copy.__kwdefaults__ = function.__kwdefaults__
  return copy


def _checked(wgmma):
  """Returns the interpreter's wgmma with race checks of its operands."""

  @gpu_callbacks.fail_on_exception
  def check(call):
    for name in ('a', 'b'):
      key = call[f'{name}_allocation_key_as_array']
      transforms = call[f'{name}_transforms']
      _check_read(call['thread'], key, transforms, call.get('source_info'))

  def checked(**call):
    check(call)
    return wgmma(**call)

  return checked


@functools.cache
def install() -> None:
  """Adds what is missing to JAX's interpreter, once for the process."""
  real = jaxpr_interpret.primitives
  wgmma = _Interpreter._interpret_wgmma_ref_p
  run_scoped = _with_globals(
    _Interpreter._interpret_run_scoped_p, primitives=real
  )

  def interpret_wgmma(self, eqn, token, get_invals):
    return _interpret_wgmma(wgmma, self, eqn, token, get_invals)

  def interpret_run_scoped(self, eqn, token, get_invals):
    if eqn.primitive is discharge.run_state_p:
      return _interpret_run_state(self, eqn, token, get_invals())
    return run_scoped(self, eqn, token, get_invals)

  _Interpreter._interpret_wgmma_ref_p = interpret_wgmma
  _Interpreter._interpret_run_scoped_p = interpret_run_scoped
  jaxpr_interpret.primitives = _Primitives(real)
  gpu_callbacks.wgmma = _checked(gpu_callbacks.wgmma)


def parameters(*, detect_races: bool = False) -> plgpu.InterpretGPUParams:
  """Returns how to interpret a kernel, with the gaps filled."""
  install()
  return plgpu.InterpretGPUParams(detect_races=detect_races)


def races_found() -> bool:
  """Returns whether the last kernel interpreted had a race."""
  return interpret_pallas_call.get_races().races_found


def reset() -> None:
  """Forgets what an interrupted kernel left behind."""
  interpret_pallas_call.reset_gpu_interpret_mode_state()
