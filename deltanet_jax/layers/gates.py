"""Decay gates and the initial values of their parameters.

The gate of Mamba-2 (Dao and Gu, arXiv 2405.21060), which the gated delta rules
took over, is g = -exp(A_log) softplus(a + dt_bias), a log-decay below 0.
"""

from flax import nnx
import jax
import jax.numpy as jnp

_DT_MIN, _DT_MAX = 1e-3, 0.1


def initial_rates(
  rngs: nnx.Rngs, shape: tuple[int, ...], low: float, high: float
) -> nnx.Param:
  """Returns A_log = log of rates uniform in (low, high)."""
  tiny = jnp.finfo(jnp.float32).tiny
  rates = jax.random.uniform(
    rngs.params(), shape, jnp.float32, max(low, tiny), high
  )
  return nnx.Param(jnp.log(rates))


def initial_dt_bias(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
  """Returns what softplus maps to step sizes log-uniform in (0.001, 0.1)."""
  log_dt = jax.random.uniform(
    rngs.params(), shape, jnp.float32, jnp.log(_DT_MIN), jnp.log(_DT_MAX)
  )
  dt = jnp.exp(log_dt)
  return nnx.Param(dt + jnp.log(-jnp.expm1(-dt)))


def log_decay(a: jax.Array, a_log: nnx.Param, dt_bias: nnx.Param) -> jax.Array:
  """Returns float32 g = -exp(a_log) softplus(a + dt_bias).

  Args:
    a: [B, T, H] or [B, T, H, K].
    a_log: [H].
    dt_bias: [H] or [H, K], as a.
  """
  dt = jax.nn.softplus(a.astype(jnp.float32) + dt_bias[...][None, None])
  rates = jnp.exp(a_log[...]).reshape(-1, *(1,) * (a.ndim - 3))
  return -rates[None, None] * dt
