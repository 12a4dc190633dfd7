"""An op shards itself over the ambient mesh.

Rows and heads of an op know nothing of one another, so each device can run the
op on its own, with no communication. XLA does not see that in a scan or in a
kernel; `sharded_call` says it, by wrapping the op in `jax.shard_map`.

The ambient mesh is the one of `jax.set_mesh`. Which of its axes carry an op's
axes depends on their type:

* Explicit: the sharding of the op's first argument tells. The others are
  resharded to it, and axes that cannot be sharded (key and value dimensions)
  are gathered.
* Auto: the name tells, by this table. A mesh axis is used where it divides the
  size, heads where it divides H and HV, so that groups of value heads stay
  with their key head. Others hold copies.

      batch  B      dcn_data, data, fsdp
      time   T      sequence
      heads  H, HV  tensor, model

* Manual: the caller's `jax.shard_map` has cut the arrays along it already. With
  no other axes, as with no mesh, the op is called as it is. With others, a
  gradient needs `check_vma=False` in the caller's `shard_map`: JAX does not
  transpose an unchecked one inside a checked one.

Where the time axis is sharded, the op is told over which mesh axes; see
`sequence_parallel` for what is exchanged then.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec

# Op axes that are sharded alike, and the Auto mesh axes that carry them.
_CARRIERS = {
  ('B',): ('dcn_data', 'data', 'fsdp'),
  ('T',): ('sequence',),
  ('H', 'HV'): ('tensor', 'model'),
}

# Arrays by name; None for an argument that is not given.
Arrays = dict[str, jax.Array | None]


def _named_sizes(arguments) -> dict[str, int]:
  sizes = {}
  for array, axes in arguments.values():
    sizes.update(zip(axes.split(), array.shape, strict=False))
  return sizes


def _explicit_axes(array, axes) -> dict[str, tuple[str, ...]]:
  """Returns the Explicit mesh axes of an array by the op axis they shard."""
  entries = jax.typeof(array).sharding.spec
  return {
    axis: (entry,) if isinstance(entry, str) else tuple(entry or ())
    for axis, entry in zip(axes.split(), entries, strict=False)
  }


def _sharding(mesh, arguments) -> dict[str, tuple[str, ...]]:
  """Returns the mesh axes of every op axis that is sharded."""
  sizes = _named_sizes(arguments)
  explicit = _explicit_axes(*next(iter(arguments.values())))
  sharding = {}
  for group, names in _CARRIERS.items():
    carriers = next((explicit[a] for a in group if explicit.get(a)), ())
    size = math.gcd(*(sizes[axis] for axis in group if axis in sizes))
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
      count = math.prod(mesh.shape[a] for a in (*carriers, name))
      if kind == AxisType.Auto and name in names and size % count == 0:
        carriers += (name,)
    sharding |= dict.fromkeys(group, carriers)
  return sharding


def _spec(array, axes, sharding) -> PartitionSpec:
  named = axes.split()[: array.ndim]
  return PartitionSpec(*(sharding.get(axis) for axis in named))


def _reshard(mesh, arguments, sharding) -> dict[str, jax.Array]:
  """Moves the arrays to where the Explicit axes of the mesh want them."""
  explicit = {
    axis: tuple(name for name in names if name in mesh.explicit_axes)
    for axis, names in sharding.items()
  }
  return {
    name: jax.sharding.reshard(array, _spec(array, axes, explicit))
    for name, (array, axes) in arguments.items()
  }


def sharded_call(
  body: Callable[[Arrays, tuple[str, ...] | None], Any],
  arguments: Mapping[str, tuple[jax.Array | None, str]],
  results: tuple[str, ...],
) -> Any:
  """Runs an op on each device's part of the batch, heads and time.

  Args:
    body: the op, called as body(arrays, time_axes). `arrays` are the device's
      parts of the arguments by name (None where None was given); `time_axes`
      are the mesh axes over which T is sharded, None if it is whole.
    arguments: `name: (array, axes)`, axes as in `shapes.check_shapes`, for
      example `'q': (q, 'B T H K')`; an array may lack the last ones. The first
      is given, has the axes B, T and H, and decides in an Explicit mesh.
    results: the axes of every result of `body`, a tuple. A result that does
      not name a sharded axis must come out equal on all devices of that axis.

  Returns:
    What `body` returns, whole.
  """
  given = {n: pair for n, pair in arguments.items() if pair[0] is not None}
  arrays = {name: array for name, (array, _) in given.items()}
  absent = dict.fromkeys(arguments)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.are_all_axes_manual:
    return body(absent | arrays, None)
  sharding = _sharding(mesh, given)
  specs = {n: _spec(*pair, sharding) for n, pair in given.items()}
  if mesh.explicit_axes:
    arrays = _reshard(mesh, given, sharding)
  time_axes = tuple(a for a in sharding['T'] if mesh.shape[a] > 1)

  def run(arrays):
    return body(absent | arrays, time_axes or None)

  sharded = jax.shard_map(
    run,
    in_specs=(specs,),
    out_specs=tuple(
      PartitionSpec(*(sharding.get(axis) for axis in axes.split()))
      for axes in results
    ),
    check_vma=False,
  )
  # Called outside of jit, a bare shard_map compiles primitive by primitive.
  return jax.jit(sharded)(arrays)
