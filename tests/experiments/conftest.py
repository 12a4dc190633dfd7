"""One finished tiny run, shared by the tests that look at what it left."""

import dataclasses
import os
import pathlib
import subprocess

import jax
import pytest

from experiments import config as config_lib
from tests.experiments import tiny_run


@dataclasses.dataclass(frozen=True)
class FinishedRun:
  config: config_lib.TrainLMConfig
  root: pathlib.Path
  result: subprocess.CompletedProcess


@pytest.fixture(scope='session')
def compilation_cache(tmp_path_factory) -> pathlib.Path:
  """A directory that every tiny run, in this process or not, compiles to."""
  given = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  return (
    pathlib.Path(given)
    if given
    else tmp_path_factory.mktemp('compilation_cache')
  )


@pytest.fixture
def cached_compilation(compilation_cache):
  """Lets this process compile to the cache while a test runs."""
  changes = {
    'jax_compilation_cache_dir': str(compilation_cache),
    'jax_persistent_cache_min_compile_time_secs': 0,
  }
  before = {name: getattr(jax.config, name) for name in changes}
  for name, value in changes.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture
def standard_promotion():
  """Lets dtypes be promoted as outside of the tests: optax counts on it."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='session')
def tiny_config(tmp_path_factory) -> config_lib.TrainLMConfig:
  files = tiny_run.write_corpus(tmp_path_factory.mktemp('text') / 'corpus')
  return tiny_run.config(files)


@pytest.fixture(scope='session')
def finished_run(
  tmp_path_factory, tiny_config, compilation_cache
) -> FinishedRun:
  """A tiny run that nothing disturbed; not to be changed."""
  root = tmp_path_factory.mktemp('finished') / 'run'
  command = tiny_run.command(tiny_config, root)
  result = tiny_run.finish(tiny_run.start(command, compilation_cache))
  assert result.returncode == 0, result.stderr
  return FinishedRun(tiny_config, root, result)
