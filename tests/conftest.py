"""Settings of every test, made before jax is imported.

Eight CPU devices, so that meshes are real; strict promotion, so that no dtype
or rank changes unseen.
"""

import os


def _add_xla_flag(flag: str) -> None:
  given = os.environ.get('XLA_FLAGS', '')
  if flag.partition('=')[0] not in given:
    os.environ['XLA_FLAGS'] = f'{given} {flag}'.strip()


os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_add_xla_flag('--xla_force_host_platform_device_count=8')
# Every xdist worker would start a thread per core for each library.
for _variable in ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
  os.environ.setdefault(_variable, '1')

import jax  # noqa: E402

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
