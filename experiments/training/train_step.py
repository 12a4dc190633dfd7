"""One optimizer step as a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import deltanet_jax
from experiments import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import optimizer as optimizer_lib
from experiments.training import spike_guard

State = dict[str, Any]
Batch = dict[str, jax.Array]


def token_losses(
  model_config: deltanet_jax.ModelConfig, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Returns the loss of every predicted token and which of them count.

  A token counts unless it is padding or the first of its document.

  Args:
    model_config: the model's configuration.
    params: its parameters.
    batch: `tokens` and `segment_ids`, int32 [B, T + 1]; without the latter,
      every row is one document.

  Returns:
    The losses in nats, float32 [B, T], and a mask of booleans [B, T].
  """
  labels, mask = _labels(batch)
  hidden, kernel = _hidden_states(model_config, params, batch)
  return deltanet_jax.cross_entropy(hidden, kernel, labels), mask


def _labels(batch):
  """Returns what is predicted [B, T], and whether it counts."""
  labels, segment_ids = batch['tokens'][:, 1:], batch.get('segment_ids')
  if segment_ids is None:
    return labels, jnp.ones(labels.shape, bool)
  same = segment_ids[:, 1:] == segment_ids[:, :-1]
  return labels, same & (segment_ids[:, 1:] != 0)


def _hidden_states(model_config, params, batch):
  segment_ids = batch.get('segment_ids')
  return deltanet_jax.hidden_states(
    model_config,
    params,
    batch['tokens'][:, :-1],
    segment_ids=None if segment_ids is None else segment_ids[:, :-1],
  )


def _summed_gradients(model_config, params, batch, num_micro_batches):
  """Returns the sums over tokens of (loss, gradient), and their number.

  Sums, not means, are accumulated: micro-batches with few tokens weigh less,
  and any split of the batch gives the same result.
  """

  def summed_loss(params, batch):
    labels, mask = _labels(batch)
    hidden, kernel = _hidden_states(model_config, params, batch)
    weights = mask.astype(jnp.float32)
    loss = deltanet_jax.summed_cross_entropy(hidden, kernel, labels, weights)
    return loss, jnp.sum(weights)

  gradient = jax.value_and_grad(summed_loss, has_aux=True)
  if num_micro_batches == 1:
    return gradient(params, batch)

  def accumulate(total, micro_batch):
    return jax.tree.map(jnp.add, total, gradient(params, micro_batch)), None

  # Every device's rows are dealt out to all micro-batches: no row moves.
  micro_batches = jax.tree.map(
    lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1),
    batch,
  )
  zero = jnp.zeros((), jnp.float32)
  start = ((zero, zero), jax.tree.map(jnp.zeros_like, params))
  return jax.lax.scan(accumulate, start, micro_batches)[0]


def init_state(config: config_lib.TrainLMConfig) -> State:
  """Returns the state before the first step: nested dicts of arrays."""
  key = jax.random.key(config.training.seed)
  params = deltanet_jax.init(config.model, key)
  optimizer = optimizer_lib.build(config.optimizer, config.training.num_steps)
  return {
    'step': jnp.zeros((), jnp.int32),
    'params': params,
    'optimizer': optimizer.init(params),
    'guard': spike_guard.init(config.training),
  }


def _train_step(config, optimizer, state, batch):
  (loss_sum, num_tokens), gradient_sum = _summed_gradients(
    config.model,
    state['params'],
    batch,
    config.training.gradient_accumulation_steps,
  )
  denominator = jnp.maximum(num_tokens, 1)
  loss = loss_sum / denominator
  gradients = jax.tree.map(lambda g: g / denominator, gradient_sum)
  norm = optax.tree.norm(gradients)
  accepted, guard = spike_guard.judge(
    state['guard'], loss, norm, config.training
  )
  updates, new_optimizer = optimizer.update(
    gradients, state['optimizer'], state['params']
  )
  new_params = optax.apply_updates(state['params'], updates)
  params, optimizer_state = spike_guard.select(
    accepted,
    (new_params, new_optimizer),
    (state['params'], state['optimizer']),
  )
  new_state = {
    'step': state['step'] + 1,
    'params': params,
    'optimizer': optimizer_state,
    'guard': guard,
  }
  metrics = {
    'loss': loss,
    'gradient_norm': norm,
    'tokens': num_tokens,
    'refused_in_a_row': guard['refused_in_a_row'],
    'refused': guard['num_refused'],
  }
  return new_state, metrics


def abstract_state(
  config: config_lib.TrainLMConfig, mesh: jax.sharding.Mesh
) -> State:
  """Returns the shapes of the state with their shardings on the mesh."""
  shapes = jax.eval_shape(lambda: init_state(config))
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    shapes,
    mesh_lib.state_shardings(shapes, mesh),
  )


def build_init(
  config: config_lib.TrainLMConfig, mesh: jax.sharding.Mesh
) -> Callable[[], State]:
  """Returns the jitted `init_state`, whose leaves are made where they live.

  No device ever holds a whole parameter that is sharded.
  """
  shardings = jax.tree.map(
    lambda leaf: leaf.sharding, abstract_state(config, mesh)
  )
  return jax.jit(lambda: init_state(config), out_shardings=shardings)


def build(
  config: config_lib.TrainLMConfig, mesh: jax.sharding.Mesh | None = None
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
  """Returns the jitted step (state, batch) -> (state, metrics).

  The state is donated. A step that `spike_guard` refuses leaves parameters and
  optimizer bit for bit as they were.

  Args:
    config: of the run.
    mesh: what `mesh.build` returned: the state lies on it as `build_init` made
      it, a batch as `mesh.batch_sharding` says; None: one device.
  """
  optimizer = optimizer_lib.build(config.optimizer, config.training.num_steps)

  def step(state, batch):
    with mesh_lib.tracing(mesh):
      return _train_step(config, optimizer, state, batch)

  if mesh is None:
    return jax.jit(step, donate_argnums=0)
  shardings = jax.tree.map(
    lambda leaf: leaf.sharding, abstract_state(config, mesh)
  )
  whole = jax.NamedSharding(mesh, jax.P())
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(shardings, mesh_lib.batch_sharding(mesh)),
    out_shardings=(shardings, whole),
  )
