"""AdamW as the paper uses it."""

import jax
import optax

from experiments import config as config_lib


def learning_rate_schedule(
  config: config_lib.OptimizerConfig, num_steps: int
) -> optax.Schedule:
  """Returns the learning rate by step: linear warm-up, then a cosine.

  Raises:
    ValueError: the warm-up is not shorter than the run.
  """
  if config.warmup_steps >= num_steps:
    raise ValueError(
      'optimizer.warmup_steps must be below training.num_steps, got '
      f'{config.warmup_steps} and {num_steps}'
    )
  return optax.schedules.warmup_cosine_decay_schedule(
    init_value=config.initial_learning_rate,
    peak_value=config.peak_learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=num_steps,
    end_value=config.final_learning_rate,
  )


def _decays(params):
  """Marks the matrices: no scale, bias, decay rate or the like is decayed."""

  def is_matrix(path, _):
    return path[-1].key in ('kernel', 'embedding')

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def build(
  config: config_lib.OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """Returns clipping by the global norm, then AdamW.

  Weight decay acts on the kernels of projections and convolutions and on the
  embedding, not on scales, biases, decay rates and other vectors.
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate_schedule(config, num_steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=_decays,
    ),
  )
