"""Where parameters and activations live on a mesh: one table of rules.

The mesh has Auto axes, any of these, in any order and of any size:

    dcn_data  copies of the model on slices that a slow network joins
    data      copies of the model; each sees its own rows of the batch
    fsdp      rows too; each device keeps a share of every large parameter and
              gathers a block's when it runs (fully sharded data parallel)
    sequence  parts of every row; states go from device to device
    tensor    heads, MLP channels and vocabulary

`PARAMETERS` maps the name of a parameter to the mesh axes of its last
dimensions; leading ones (the layers that a scan goes over) are whole. What no
rule names is sharded over fsdp along the longest of its last two dimensions, if
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
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BATCH = ('dcn_data', 'data', 'fsdp')
Entry = str | tuple[str, ...] | None

# The first pattern that the whole dotted name ends in decides.
PARAMETERS: tuple[tuple[str, tuple[Entry, ...]], ...] = (
  (r'embedding\.embedding', ('tensor', 'fsdp')),  # [vocab, D]
  (r'output\.kernel', ('fsdp', 'tensor')),  # [D, vocab]
  (r'mlp\.(gate|up)\.kernel', ('fsdp', 'tensor')),  # [D, F]
  (r'mlp\.down\.kernel', ('tensor', 'fsdp')),  # [F, D]
  (
    r'mixer\.(q|k|v|r|beta|a|gate)_proj\.kernel',
    ('fsdp', 'tensor'),
  ),  # [D, H K]
  (r'mixer\.\w+_proj\.down\.kernel', ('fsdp', None)),  # [D, rank]
  (r'mixer\.\w+_proj\.up\.kernel', ('fsdp', 'tensor')),  # [rank, H K]
  (r'mixer\.\w+_proj\.up\.bias', ('tensor',)),  # [H K]
  (r'mixer\.o_proj\.kernel', ('tensor', 'fsdp')),  # [H V, D]
  (r'mixer\.(q|k|v)_conv\.kernel', (None, 'tensor')),  # [W, H K]
  (r'mixer\.shift_down', ('fsdp', None, None)),  # [D, 5, rank]
  (r'mixer\.shift_up', (None, None, 'fsdp')),  # [5, rank, D]
  (r'mixer\.(log_rate|frequency)', ('fsdp', None)),  # [channels, N]
  (r'mixer\.c', ('fsdp', None, None)),  # [channels, N, 2]
  (r'filter\.output', (None, 'fsdp')),  # [features, D]
)
# The name under which `jax.checkpoint` knows parameters that were gathered.
GATHERED = 'gathered_parameter'
_IS_NOT_GATHERED = jax.checkpoint_policies.save_anything_except_these_names(
  GATHERED
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
  return ('fsdp', None) if shape[-2] >= shape[-1] else (None, 'fsdp')


def _kept(entry: Entry, size: int, mesh) -> Entry:
  """Returns the axes of an entry that are larger than 1 and divide the size."""
  kept = ()
  for axis in (entry,) if isinstance(entry, str) else entry or ():
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, gathered, sharded):
  del sharded
  return lax.with_sharding_constraint(x, gathered)


def _gather_fwd(x, gathered, sharded):
  return _gather(x, gathered, sharded), None


def _gather_bwd(gathered, sharded, _, dx):
  del gathered
  return (lax.with_sharding_constraint(dx, sharded),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather(params: Any, prefix: str = '') -> Any:
  """Gathers parameters over fsdp, for use; their gradients are scattered.

  Args:
    params: nested dict or state of arrays.
    prefix: dotted name of `params` in the model.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if ambient_size('fsdp') == 1:
    return params

  def one(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    spec = fit(_rule(f'{prefix}{name}', x.shape), x.shape, mesh)
    if 'fsdp' not in spec:
      return x
    whole = PartitionSpec(*(None if e == 'fsdp' else e for e in spec))
    return checkpoint_name(_gather(x, whole, spec), GATHERED)

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
  if ambient_size('fsdp') == 1:
    return function
  shapes = {x.shape for x in jax.tree.leaves(params)}

  def is_kept(primitive, *operands, **settings) -> bool:
    # `jax.checkpoint` cannot keep complex numbers: its reduce_precision has
    # none.
    if _is_complex(primitive, operands, settings):
      return False
    if primitive is lax.convert_element_type_p and operands[0].shape in shapes:
      return False
    return _IS_NOT_GATHERED(primitive, *operands, **settings)

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
  """Gathers a device's share of a parameter over fsdp, inside a shard_map."""
  if 'fsdp' not in spec:
    return x
  return lax.all_gather(x, 'fsdp', axis=spec.index('fsdp'), tiled=True)


def reduce_to_share(
  dx: jax.Array, spec: PartitionSpec, tokens: PartitionSpec
) -> jax.Array:
  """Sums a parameter's gradient over all tokens; the reverse of `gather_share`.

  Args:
    dx: the gradient by the device's own tokens, inside a shard_map.
    spec: of the parameter.
    tokens: of an array [B, T]. Devices that hold the same tokens count once.
  """
  entries = [(e,) if isinstance(e, str) else e or () for e in tokens]
  cut = {axis for entry in entries for axis in entry}
  if 'fsdp' in spec:
    if 'fsdp' not in cut:
      dx = dx / lax.axis_size('fsdp')
    dx = lax.psum_scatter(
      dx, 'fsdp', scatter_dimension=spec.index('fsdp'), tiled=True
    )
    cut.discard('fsdp')
  return lax.psum(dx, tuple(sorted(cut))) if cut else dx
