"""Shape checks whose message names the argument, the axis and both sizes."""

from typing import Any


def check_shapes(**arrays: tuple[Any, str]) -> dict[str, int]:
  """Checks arrays against named axes and returns the size of every axis.

  Args:
    **arrays: `name=(array, axes)`, axes as names separated by spaces, for
      example `q=(q, 'B T H K')`. An axis takes its size from the first array
      that names it.

  Returns:
    The sizes by axis name.

  Raises:
    ValueError: another number of axes than named, or an axis whose size
      differs from an earlier array's.
  """
  sizes: dict[str, int] = {}
  origin: dict[str, str] = {}
  for name, (array, axes) in arrays.items():
    names = axes.split()
    if len(array.shape) != len(names):
      raise ValueError(
        f'{name} must have the {len(names)} axes [{", ".join(names)}], got '
        f'shape {tuple(array.shape)}'
      )
    for axis, size in zip(names, array.shape, strict=True):
      expected = sizes.setdefault(axis, size)
      origin.setdefault(axis, name)
      if size != expected:
        raise ValueError(
          f'axis {axis} of {name} must be {expected} as in {origin[axis]}, '
          f'got {size} (shape {tuple(array.shape)}, axes '
          f'[{", ".join(names)}])'
        )
  return sizes
