"""AdamW whose learning rate and weight decay may differ between runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.synthetic import config as config_lib


class RunState(NamedTuple):
  """What a run carries from step to step; runs are stacked in front.

  Attributes:
    params: of the model.
    moments: of Adam.
    step: int32, steps that were taken.
    key: of the dropout.
    learning_rate: the highest.
    weight_decay: on all parameters.
  """

  params: Any
  moments: Any
  step: jax.Array
  key: jax.Array
  learning_rate: jax.Array
  weight_decay: jax.Array


def rate_factor(
  config: config_lib.TrainingConfig, step: jax.Array
) -> jax.Array:
  """Returns the learning rate of a step as a part of the highest."""
  step = step.astype(jnp.float32)
  per_epoch = config.steps_per_epoch
  warmup = config.warmup_steps
  rise = jnp.minimum((step + 1) / (warmup + 1), 1)
  if config.schedule == 'constant':
    return rise
  total = max(config.num_epochs * per_epoch - warmup, 1)
  done = jnp.maximum(step - warmup, 0)
  if config.schedule == 'cosine_by_epoch':
    done = jnp.floor(done / per_epoch) * per_epoch
  cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(done / total, 1)))
  return rise * (config.final_ratio + (1 - config.final_ratio) * cosine)


def _transform(config):
  adam = optax.scale_by_adam(b2=config.b2)
  if not config.clip_norm:
    return adam
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def init(
  config: config_lib.TrainingConfig,
  params: Any,
  *,
  key: jax.Array,
  learning_rate: jax.Array,
  weight_decay: jax.Array,
) -> RunState:
  """Returns the state before the first step."""
  return RunState(
    params=params,
    moments=_transform(config).init(params),
    step=jnp.zeros((), jnp.int32),
    key=key,
    learning_rate=learning_rate,
    weight_decay=weight_decay,
  )


def update(
  config: config_lib.TrainingConfig, state: RunState, gradients: Any
) -> RunState:
  """Takes a step: p -= rate (adam(gradient) + weight_decay p)."""
  direction, moments = _transform(config).update(gradients, state.moments)
  rate = state.learning_rate * rate_factor(config, state.step)
  params = jax.tree.map(
    lambda p, d: p - rate * (d + state.weight_decay * p),
    state.params,
    direction,
  )
  return state._replace(params=params, moments=moments, step=state.step + 1)
