"""The rules that the arguments of every recurrence keep, beside their shapes.

Errors name the argument, the rule and what was given.
"""

import jax
import jax.numpy as jnp

_DTYPES = ('float32', 'bfloat16', 'float64')


def check_dtypes(shared, **others: jax.Array | None) -> None:
  """Checks that `shared` have one dtype of the ops, `others` a float one.

  Args:
    shared: arrays by name.
    **others: arrays, or None for those not given.

  Raises:
    ValueError: a dtype breaks the rule.
  """
  dtypes = [x.dtype.name for x in shared.values()]
  if len(set(dtypes)) > 1 or dtypes[0] not in _DTYPES:
    raise ValueError(
      f'{", ".join(shared)} must share one dtype of {", ".join(_DTYPES)}, got '
      f'{", ".join(dtypes)}'
    )
  for name, array in others.items():
    if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f'{name} must be of a float dtype, got {array.dtype}')


def check_sizes(sizes: dict[str, int], chunk_size: int | None = None) -> None:
  """Checks the sizes of `shapes.check_shapes` against one another.

  Raises:
    ValueError: HV is no multiple of H, or T or `chunk_size` is below 1.
  """
  if sizes['HV'] % sizes['H']:
    raise ValueError(
      'the value heads HV must be a multiple of the key heads H, got '
      f'HV={sizes["HV"]} and H={sizes["H"]}'
    )
  if sizes.get('T', 1) < 1:
    raise ValueError(f'T must be at least 1, got {sizes["T"]}')
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f'chunk_size must be at least 1, got {chunk_size}')


def check_segment_ids(
  segment_ids: jax.Array | None, sizes: dict[str, int]
) -> None:
  """Checks that ids, if given, are integers [B, T].

  Raises:
    ValueError: they are not.
  """
  if segment_ids is None:
    return
  expected = (sizes['B'], sizes['T'])
  if segment_ids.shape != expected or not jnp.issubdtype(
    segment_ids.dtype, jnp.integer
  ):
    raise ValueError(
      f'segment_ids must be integers of shape [B, T] = {expected}, got '
      f'{segment_ids.dtype} of shape {tuple(segment_ids.shape)}'
    )


def state_dtype(x: jax.Array) -> jnp.dtype:
  """Returns the dtype of the states of an op whose arrays are like x."""
  return x.dtype if x.dtype == jnp.float64 else jnp.dtype(jnp.float32)


def check_state(
  name: str, state: jax.Array | None, axes: str, sizes: dict[str, int], dtype
) -> None:
  """Checks shape and dtype of a state, if given; `axes` like 'B HV K V'.

  Raises:
    ValueError: they differ.
  """
  if state is None:
    return
  expected = tuple(sizes[axis] for axis in axes.split())
  if state.shape != expected or state.dtype != dtype:
    raise ValueError(
      f'{name} must be {jnp.dtype(dtype).name} of shape '
      f'[{", ".join(axes.split())}] = {expected}, got {state.dtype} of shape '
      f'{tuple(state.shape)}'
    )
