"""What a run runs on: package versions, source commit, devices."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess

import jax

PACKAGES = (
  'jax',
  'jaxlib',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
  'jax-triton',
)
_NOT_INSTALLED = 'not installed'


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return _NOT_INSTALLED


def versions() -> dict[str, str]:
  """Returns the versions of Python and of `PACKAGES` (or 'not installed')."""
  return {'python': platform.python_version()} | {
    package: _version(package) for package in PACKAGES
  }


def _git(*arguments: str) -> str | None:
  """Returns what git prints about this source tree; None without git."""
  source = pathlib.Path(__file__).resolve().parent
  try:
    result = subprocess.run(
      ['git', '-C', str(source), *arguments],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return result.stdout.strip()


@functools.cache
def driver() -> str | None:
  """Returns the version of NVIDIA's driver; None where there is none."""
  query = ['--query-gpu=driver_version', '--format=csv,noheader']
  try:
    result = subprocess.run(
      ['nvidia-smi', *query],
      capture_output=True,
      text=True,
      timeout=30,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return result.stdout.partition('\n')[0].strip()


def commit() -> str:
  """Returns the commit of the source tree, or 'unknown' without git.

  '-modified' follows when tracked files differ from that commit. The variable
  SOURCE_COMMIT says it of a copy of the tree that has not its history.
  """
  if 'SOURCE_COMMIT' in os.environ:
    return os.environ['SOURCE_COMMIT']
  revision = _git('rev-parse', 'HEAD')
  if not revision:
    return 'unknown'
  status = _git('status', '--porcelain', '--untracked-files=no')
  return f'{revision}-modified' if status else revision


def glibc_tunables() -> str | None:
  """Returns what malloc was told, huge pages say; None: nothing.

  It decides what fresh memory costs on a CPU, to the token scan's backward pass
  half of its time.
  """
  return os.environ.get('GLIBC_TUNABLES') or None


def devices() -> str:
  """Returns number and kind of the accelerators, as in '8 x NVIDIA H100'."""
  kinds = [device.device_kind for device in jax.devices()]
  return ', '.join(
    f'{kinds.count(kind)} x {kind}' for kind in dict.fromkeys(kinds)
  )
