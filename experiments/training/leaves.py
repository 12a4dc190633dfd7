"""The leaves of a train state, as a checkpoint describes and restores them."""

import pathlib
from typing import Any

import jax


def describe(state: Any) -> dict[str, str]:
  """Returns dtype and shape, or `empty`, of each leaf by its path.

  Raises:
    ValueError: a leaf is neither an array nor an abstract one.
  """
  described = {}
  leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_empty)
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path)
    if _is_empty(leaf):
      described[name] = 'empty'
      continue
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
      raise ValueError(
        f'every leaf of a state must be a jax array, {name} is a '
        f'{type(leaf).__name__}'
      )
    described[name] = f'{leaf.dtype}{list(leaf.shape)}'
  return described


def _is_empty(node: Any) -> bool:
  return node is None or (isinstance(node, dict | list | tuple) and not node)


def require_same(
  path: pathlib.Path, saved: dict[str, str], wanted: dict[str, str]
) -> None:
  """Compares what `describe` returned for a checkpoint and for this run.

  Raises:
    ValueError: a leaf is missing, is new, or differs; names it.
  """
  for name in [*wanted, *saved]:
    found = saved.get(name, 'missing')
    expected = wanted.get(name, 'not wanted')
    if found != expected:
      raise ValueError(
        f'checkpoint {path} does not fit this run: leaf {name} is {found} in '
        f'the checkpoint and {expected} here; use the model and optimizer '
        'that it was saved with'
      )


def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns an abstract array with a sharding; without one, the first device.

  Raises:
    ValueError: it has none, and there are several processes.
  """
  if leaf.sharding is not None:
    return leaf
  if jax.process_count() > 1:
    raise ValueError(
      'with several processes every leaf of the abstract state needs a '
      f'sharding; {leaf} has none'
    )
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
