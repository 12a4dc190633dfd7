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

import functools
import math
import re
from typing import Any

import jax
from jax.sharding import PartitionSpec

BATCH = ('dcn_data', 'data', 'fsdp')
Entry = str | tuple[str, ...] | None

# The first pattern that the whole dotted name ends in decides.
PARAMETERS: tuple[tuple[str, tuple[Entry, ...]], ...] = (
  (r'embedding\.embedding', ('tensor', 'fsdp')),  # [vocab, D]
  (r'output\.kernel', ('fsdp', 'tensor')),  # [D, vocab]
  (r'mlp\.(gate|up)\.kernel', ('fsdp', 'tensor')),  # [D, F]
  (r'mlp\.down\.kernel', ('tensor', 'fsdp')),  # [F, D]
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
  """Returns the axes of an entry that the mesh has and that divide the size."""
  kept = ()
  for axis in (entry,) if isinstance(entry, str) else entry or ():
    count = math.prod(mesh.shape[a] for a in kept) * mesh.shape.get(axis, 1)
    if axis in mesh.shape and size % count == 0:
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
  return jax.lax.with_sharding_constraint(
    x, fit(ACTIVATIONS[name], x.shape, mesh)
  )
