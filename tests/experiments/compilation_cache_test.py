import jax
import pytest

from experiments import compilation_cache


@pytest.fixture(autouse=True)
def _restored():
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update('jax_compilation_cache_dir', before)


def test_the_environment_decides_where(monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', '/caches')
  expected = '/caches/deltanet_jax/compiled'
  assert compilation_cache.default_directory() == expected
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', '/home/user')
  expected = '/home/user/.cache/deltanet_jax/compiled'
  assert compilation_cache.default_directory() == expected
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '/given')
  assert compilation_cache.default_directory() == '/given'


def test_empty_is_off(tmp_path):
  compilation_cache.keep_in(str(tmp_path))
  assert jax.config.jax_compilation_cache_dir == str(tmp_path)
  compilation_cache.keep_in('')
  assert jax.config.jax_compilation_cache_dir is None
