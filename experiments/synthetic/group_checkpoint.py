"""A file with what a group of runs has reached, so that a kill loses an epoch.

It is an `.npz` without pickles: the arrays of the states by their path, the
histories as JSON, the keys of the runs. Its checksums are those of a zip file.
"""

from collections.abc import Sequence
import dataclasses
import io
import json
import os
import pathlib
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
import numpy as np

from experiments import atomic_file
from experiments.synthetic import config as config_lib

_RUNS, _HISTORIES, _STATES = 'runs', 'histories', 'states'


def _is_key(leaf) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _names(states) -> list[str]:
  paths = jax.tree.leaves_with_path(states)
  return [_STATES + jax.tree_util.keystr(path) for path, _ in paths]


def save(
  path: str | os.PathLike,
  runs: Sequence[config_lib.RunConfig],
  states: Any,
  histories: Sequence[Any],
) -> None:
  """Replaces the file.

  Args:
    path: of the file.
    runs: of the group.
    states: tree of arrays and keys.
    histories: a dataclass of lists for every run.

  Raises:
    OSError: it cannot be written; the old one is untouched.
  """
  arrays = {
    _RUNS: np.array([config_lib.key(run) for run in runs]),
    _HISTORIES: np.array(
      json.dumps([dataclasses.asdict(h) for h in histories])
    ),
  }
  for name, leaf in zip(_names(states), jax.tree.leaves(states), strict=True):
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    arrays[name] = np.asarray(leaf)
  file = io.BytesIO()
  np.savez(file, allow_pickle=False, **arrays)
  atomic_file.replace(path, file.getvalue())


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
  contents = io.BytesIO(path.read_bytes())
  try:
    with np.load(contents, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    return {_RUNS: arrays.pop(_RUNS), **arrays}
  except (
    EOFError,
    KeyError,
    RuntimeError,
    ValueError,
    zipfile.BadZipFile,
  ) as error:
    raise ValueError(f'{path} is damaged ({error}); remove it') from error


def run_keys(path: str | os.PathLike) -> list[str]:
  """Returns the keys of the runs of a file; none where there is no file.

  Raises:
    ValueError: the file is damaged.
  """
  path = pathlib.Path(path)
  return _read(path)[_RUNS].tolist() if path.exists() else []


def _restored(path, name, array, like):
  stored = jax.eval_shape(jax.random.key_data, like) if _is_key(like) else like
  if array.shape != stored.shape or array.dtype != stored.dtype:
    raise ValueError(
      f'{path}: {name} must be {stored.dtype}{list(stored.shape)}, got '
      f'{array.dtype}{list(array.shape)}; remove the file'
    )
  if _is_key(like):
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
  return jnp.asarray(array)


def load(
  path: str | os.PathLike, runs: Sequence[config_lib.RunConfig], states: Any
) -> tuple[Any, list[dict[str, Any]]] | None:
  """Returns (states, fields of the histories), or None where there is no file.

  Args:
    path: of the file.
    runs: of the group.
    states: what `save` was given, or its shapes and dtypes.

  Raises:
    ValueError: the file is damaged, of other runs or of another model.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return None
  arrays = _read(path)
  expected, found = [config_lib.key(r) for r in runs], arrays[_RUNS].tolist()
  if found != expected:
    raise ValueError(
      f'{path} must be of the runs {expected}, got {found}: finish those '
      'by the command that began them, or remove the file'
    )
  names, (leaves, tree) = _names(states), jax.tree.flatten(states)
  if set(arrays) != {_RUNS, _HISTORIES, *names}:
    raise ValueError(f'{path} is of another version of this model; remove it')
  leaves = [
    _restored(path, name, arrays[name], like)
    for name, like in zip(names, leaves, strict=True)
  ]
  histories = json.loads(str(arrays[_HISTORIES]))
  return jax.tree.unflatten(tree, leaves), histories
