"""Where parameters and activations live on a mesh: one table of rules.

The mesh has Auto axes, any of these, in any order and of any size:

    dcn_data  copies of the model on slices that a slow network joins
    data      copies of the model; each sees its own rows of the batch
    fsdp      rows too
    sequence  parts of every row; states go from device to device
    tensor    heads, MLP channels and vocabulary

Over `SHARDS`, fsdp and sequence, each device keeps a share of every large
parameter and gathers a block's when it runs (fully sharded data parallel).

`PARAMETERS` maps the name of a parameter to the mesh axes of its last
dimensions; leading ones (the layers that a scan goes over) are whole. What no
rule names is cut over SHARDS along the longest of its last two dimensions, if
it is a matrix, and copied otherwise. An axis that does not divide its dimension
is left out there. Slots of an optimizer end in the name of their parameter and
so get its rule.

Everything here reads the ambient mesh (`jax.set_mesh`); without one, nothing
happens.
"""

from collections.abc import Callable
import functools
import math
import re
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BATCH = ('dcn_data', 'data', 'fsdp')
SHARDS = ('fsdp', 'sequence')
Entry = str | tuple[str, ...] | None

# The first pattern that the whole dotted name ends in decides.
PARAMETERS: tuple[tuple[str, tuple[Entry, ...]], ...] = (
  (r'embedding\.embedding', ('tensor', SHARDS)),  # [vocab, D]
  (r'output\.kernel', (SHARDS, 'tensor')),  # [D, vocab]
  (r'mlp\.(gate|up)\.kernel', (SHARDS, 'tensor')),  # [D, F]
  (r'mlp\.down\.kernel', ('tensor', SHARDS)),  # [F, D]
  (
    r'mixer\.(q|k|v|r|beta|a|gate)_proj\.kernel',
    (SHARDS, 'tensor'),
  ),  # [D, H K]
  (r'mixer\.\w+_proj\.down\.kernel', (SHARDS, None)),  # [D, rank]
  (r'mixer\.\w+_proj\.up\.kernel', (SHARDS, 'tensor')),  # [rank, H K]
  (r'mixer\.\w+_proj\.up\.bias', ('tensor',)),  # [H K]
  (r'mixer\.o_proj\.kernel', ('tensor', SHARDS)),  # [H V, D]
  (r'mixer\.(q|k|v)_conv\.kernel', (None, 'tensor')),  # [W, H K]
  (r'mixer\.shift_down', (SHARDS, None, None)),  # [D, 5, rank]
  (r'mixer\.shift_up', (None, None, SHARDS)),  # [5, rank, D]
  (r'mixer\.(log_rate|frequency)', (SHARDS, None)),  # [channels, N]
  (r'mixer\.c', (SHARDS, None, None)),  # [channels, N, 2]
  (r'filter\.output', (None, SHARDS)),  # [features, D]
)

# Axes of arrays between the layers, by name.
ACTIVATIONS: dict[str, tuple[Entry, ...]] = {
  'ids': (BATCH, None),  # [B, T]: small, and whole where runs are numbered
  'tokens': (BATCH, 'sequence'),  # [B, T]
  'stream': (BATCH, 'sequence', None),  # [B, T, D]
}


@functools.lru_cache(maxsize=4096)
def _rule(name: str, shape: tuple[int, ...]) -> tuple[Entry, ...]:
  for pattern, entries in PARAMETERS:
    if re.search(rf'(^|\.){pattern}$', name):
      return entries
  if len(shape) < 2 or not re.search(r'kernel\w*$', name):
    return ()
  return (SHARDS, None) if shape[-2] >= shape[-1] else (None, SHARDS)


def _axes(entry: Entry) -> tuple[str, ...]:
  return (entry,) if isinstance(entry, str) else entry or ()


def _kept(entry: Entry, size: int, mesh) -> Entry:
  """Returns the axes of an entry that are larger than 1 and divide the size."""
  kept = ()
  for axis in _axes(entry):
    own = mesh.shape.get(axis, 1)
    if own > 1 and size % (own * math.prod(mesh.shape[a] for a in kept)) == 0:
      kept += (axis,)
  return kept[0] if len(kept) == 1 else kept or None


def fit(entries: tuple[Entry, ...], shape: tuple[int, ...], mesh: Any):
  """Returns entries for the last dimensions of a shape as a PartitionSpec."""
  whole = (None,) * (len(shape) - len(entries)) + entries
  return PartitionSpec(
    *(_kept(e, n, mesh) for e, n in zip(whole, shape, strict=True))
  )


def parameter_specs(tree: Any, mesh: Any) -> Any:
  """Returns the PartitionSpec of every leaf of parameters or optimizer slots.

  Args:
    tree: nested arrays or shapes, whose paths end in names of parameters.
    mesh: a `jax.sharding.Mesh` or `AbstractMesh`.
  """

  def spec(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    return fit(_rule(name, leaf.shape), leaf.shape, mesh)

  return jax.tree_util.tree_map_with_path(spec, tree)


def constrain(x: jax.Array, name: str) -> jax.Array:
  """Places an activation as `ACTIVATIONS` says on the ambient mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return lax.with_sharding_constraint(x, fit(ACTIVATIONS[name], x.shape, mesh))


def _shared(spec: PartitionSpec) -> tuple[int, tuple[str, ...]]:
  """Returns which dimension of a parameter SHARDS cut, and those that do."""
  for dimension, entry in enumerate(spec):
    if set(_axes(entry)) & set(SHARDS):
      return dimension, _axes(entry)
  return 0, ()


def _num_shares() -> int:
  """Returns the number of shares of parameters on the ambient mesh."""
  return math.prod(ambient_size(axis) for axis in SHARDS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, gathered, sharded):
  del sharded
  return lax.with_sharding_constraint(x, gathered)


def _gather_fwd(x, gathered, sharded):
  # Not `_gather`, all of whose results `jax.checkpoint` would keep.
  del sharded
  return lax.with_sharding_constraint(x, gathered), None


def _gather_bwd(gathered, sharded, _, dx):
  del gathered
  return (lax.with_sharding_constraint(dx, sharded),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather(params: Any) -> Any:
  """Gathers parameters over SHARDS, for use; their gradients are scattered.

  Args:
    params: nested dict or state of arrays.
  """
  if _num_shares() == 1:
    return params

  def one(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    # A leaf of an `nnx.State` is the value of a variable.
    spec = parameter_spec(name.removesuffix('.value'), x.shape)
    dimension, axes = _shared(spec)
    if not axes:
      return x
    whole = PartitionSpec(*spec[:dimension], None, *spec[dimension + 1 :])
    return _gather(x, whole, spec)

  return jax.tree_util.tree_map_with_path(one, params)


def _is_complex(primitive, operands, params) -> bool:
  """Returns whether complex numbers are read or made."""
  if primitive is lax.fft_p:
    return params['fft_type'] is not lax.FftType.IRFFT
  dtypes = [x.dtype for x in operands] + [params.get('new_dtype')]
  return primitive is lax.complex_p or any(
    dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating)
    for dtype in dtypes
  )


def except_gathered(
  function: Callable, params: Any, *, prevent_cse: bool
) -> Callable:
  """Lets the backward pass of a block gather its parameters once more.

  Otherwise what was gathered, or its copy in the dtype of the activations,
  would be kept for it, all layers' at once.

  Args:
    function: of a block, whose parameters `gather` gathers.
    params: tree of arrays with the shapes that `function` sees.
    prevent_cse: see `jax.checkpoint`.
  """
  if _num_shares() == 1:
    return function
  shapes = {x.shape for x in jax.tree.leaves(params)}

  def is_kept(primitive, *operands, **settings) -> bool:
    # `jax.checkpoint` cannot keep complex numbers: its reduce_precision has
    # none.
    if _is_complex(primitive, operands, settings):
      return False
    return (
      primitive not in (lax.sharding_constraint_p, lax.convert_element_type_p)
      or operands[0].shape not in shapes
    )

  return jax.checkpoint(function, policy=is_kept, prevent_cse=prevent_cse)


def shard_map(body: Callable, specs: Any, results: Any) -> Callable:
  """Returns `body` over the ambient mesh, all of whose axes become Manual."""
  mapped = jax.shard_map(
    body, in_specs=specs, out_specs=results, check_vma=False
  )
  # Called outside of jit, a bare shard_map compiles primitive by primitive.
  return jax.jit(mapped)


def parameter_spec(name: str, shape: tuple[int, ...]) -> PartitionSpec:
  """Returns where a parameter lies on the ambient mesh."""
  return fit(_rule(name, shape), shape, jax.sharding.get_abstract_mesh())


def activation_spec(name: str, shape: tuple[int, ...]) -> PartitionSpec:
  """Returns where an activation lies on the ambient mesh."""
  return fit(ACTIVATIONS[name], shape, jax.sharding.get_abstract_mesh())


def ambient_size(axis: str) -> int:
  """Returns the size of an axis of the ambient mesh, 1 if it has none."""
  return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def gather_share(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  """Gathers a device's share of a parameter over SHARDS, inside a shard_map."""
  dimension, axes = _shared(spec)
  return lax.all_gather(x, axes, axis=dimension, tiled=True) if axes else x


def reduce_to_share(
  dx: jax.Array, spec: PartitionSpec, tokens: PartitionSpec
) -> jax.Array:
  """Sums a parameter's gradient over all tokens; the reverse of `gather_share`.

  Args:
    dx: the gradient by the device's own tokens, inside a shard_map.
    spec: of the parameter.
    tokens: of an array [B, T]. Devices that hold the same tokens count once.
  """
  cut = {axis for entry in tokens for axis in _axes(entry)}
  dimension, axes = _shared(spec)
  if axes:
    copies = math.prod(lax.axis_size(axis) for axis in axes if axis not in cut)
    dx = lax.psum_scatter(
      dx / copies, axes, scatter_dimension=dimension, tiled=True
    )
  others = tuple(sorted(cut.difference(axes)))
  return lax.psum(dx, others) if others else dx
