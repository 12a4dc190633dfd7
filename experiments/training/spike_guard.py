"""Decides whether a step is applied: not if it is not finite or a spike."""

from typing import Any

import jax
import jax.numpy as jnp

from experiments import config as config_lib

State = dict[str, jax.Array]


def init(config: config_lib.TrainingConfig) -> State:
  """Returns a guard that has seen nothing.

  Its state is part of the train state, so that a resumed run decides as the
  uninterrupted one.
  """
  return {
    'history': jnp.zeros((2, config.spike_window), jnp.float32),
    'num_accepted': jnp.zeros((), jnp.int32),
    'refused_in_a_row': jnp.zeros((), jnp.int32),
    'num_refused': jnp.zeros((), jnp.int32),
  }


def _log_norm(values: jax.Array) -> jax.Array:
  """Returns (loss, norm), stacked along the first axis, as (loss, log norm)."""
  return values.at[1].set(jnp.log(values[1]))


def judge(
  state: State,
  loss: jax.Array,
  gradient_norm: jax.Array,
  config: config_lib.TrainingConfig,
) -> tuple[jax.Array, State]:
  """Returns whether to apply a step, and the new state.

  A step is refused when its loss or its gradient norm is not finite, or when
  its loss or the logarithm of its norm lies more than `spike_sigmas` standard
  deviations above the mean of the last `spike_window` accepted steps (once
  there are that many). Norms are positive and heavy-tailed, nearer to
  log-normal than to normal: on their own scale more healthy steps lie many
  deviations above the mean. A norm of 0, which has no finite logarithm, is
  accepted and left out of the mean and the deviation.

  Args:
    state: the guard's state.
    loss: of the step, a scalar.
    gradient_norm: of the step before clipping, a scalar.
    config: the rule's numbers.

  Returns:
    A boolean scalar and the new state.
  """
  values = jnp.stack([loss, gradient_norm])  # [2]
  history = state['history']
  past = _log_norm(history)
  known = jnp.isfinite(past)
  deviation = past.std(1, where=known)
  limit = past.mean(1, where=known) + config.spike_sigmas * deviation
  is_spike = _log_norm(values) > limit  # False for a limit that is NaN
  warm = state['num_accepted'] >= config.spike_window
  accepted = jnp.all(jnp.isfinite(values) & ~(warm & is_spike))
  slot = state['num_accepted'] % config.spike_window
  return accepted, {
    'history': jnp.where(accepted, history.at[:, slot].set(values), history),
    'num_accepted': state['num_accepted'] + accepted.astype(jnp.int32),
    'refused_in_a_row': jnp.where(accepted, 0, state['refused_in_a_row'] + 1),
    'num_refused': state['num_refused'] + (~accepted).astype(jnp.int32),
  }


def select(accepted: jax.Array, new: Any, old: Any) -> Any:
  """Returns the tree `new` where the step is accepted, else `old`."""
  return jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)
