"""Settings of every test, made before jax is imported.

Eight CPU devices, so that meshes are real; strict promotion, so that no dtype
or rank changes unseen. Compiling takes most of the time: what is compiled is
kept for the other workers and the next run, and machine code is not optimised,
unless XLA_FLAGS says at which level (`.ci/run` tests the oldest jax at 3, which
is what users run).
"""

import os
import pathlib


def _add_xla_flag(flag: str) -> None:
  given = os.environ.get('XLA_FLAGS', '')
  if flag.partition('=')[0] not in given:
    os.environ['XLA_FLAGS'] = f'{given} {flag}'.strip()


os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_add_xla_flag('--xla_force_host_platform_device_count=8')
_add_xla_flag('--xla_backend_optimization_level=0')
_cache = pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'compiled'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_cache))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
# Every xdist worker would start a thread per core for each library.
for _variable in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
  os.environ.setdefault(_variable, '1')

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(autouse=True, scope='module')
def _forget_compiled_programs():
  """Keeps a worker below the 65,530 memory maps that Linux allows a process.

  A program of XLA's CPU backend takes some ten of them, and JAX keeps them all.
  """
  yield
  jax.clear_caches()
