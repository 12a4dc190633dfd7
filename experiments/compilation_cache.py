"""Keeps compiled programs from one start of a program to the next.

They lie where a user's caches lie, `$XDG_CACHE_HOME/deltanet_jax/compiled` or
`~/.cache/deltanet_jax/compiled`, named by JAX after the program, its versions
and its devices; the directory may be deleted at any time.
"""

import os
import pathlib

import jax


def default_directory() -> str:
  """Returns where compiled programs are kept if nothing else is said."""
  given = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  if given is not None:
    return given
  caches = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return str(pathlib.Path(caches) / 'deltanet_jax' / 'compiled')


def keep_in(directory: str) -> None:
  """Makes JAX keep compiled programs in a directory; empty: nowhere."""
  jax.config.update('jax_compilation_cache_dir', directory or None)
