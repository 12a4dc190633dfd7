"""Training on a copy task: random tokens, then the same again."""

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax import language_model

HALF = 4
_B1, _B2, _EPS = 0.9, 0.99, 1e-8


def _adam(gradient, moments, step):
  """Returns Adam's direction and the new moments of a parameter."""
  mean, square = moments
  mean = _B1 * mean + (1 - _B1) * gradient
  square = _B2 * square + (1 - _B2) * gradient**2
  mean_hat, square_hat = mean / (1 - _B1**step), square / (1 - _B2**step)
  return mean_hat / (jnp.sqrt(square_hat) + _EPS), (mean, square)


def train(
  config, params, jit, *, num_steps, learning_rate, batch=8, fresh=False
):
  """Returns the loss of every step: nats per token of the second half.

  Args:
    config: of the model.
    params: of the model, at first.
    jit: compiles a step.
    num_steps: steps of Adam.
    learning_rate: theirs.
    batch: rows of a step.
    fresh: other rows at every step, or always the same.
  """
  random = np.random.default_rng(0)
  leaves, tree = jax.tree.flatten(params)
  moments = [(jnp.zeros_like(x), jnp.zeros_like(x)) for x in leaves]

  def loss(leaves, tokens):
    params = tree.unflatten(leaves)
    logits, _ = language_model.apply(config, params, tokens[:, :-1])
    log_p = jax.nn.log_softmax(logits[:, HALF - 1 :])
    targets = tokens[:, HALF:, None]
    return -jnp.mean(jnp.take_along_axis(log_p, targets, axis=-1))

  def step(leaves, moments, tokens, index):
    value, gradients = jax.value_and_grad(loss)(leaves, tokens)
    moved, kept = [], []
    for x, gradient, moment in zip(leaves, gradients, moments, strict=True):
      direction, moment = _adam(gradient, moment, index)
      moved.append(x - learning_rate * direction)
      kept.append(moment)
    return moved, kept, value

  step, losses = jit(step), []
  for index in range(num_steps):
    if fresh or not index:
      half = random.integers(0, config.vocab_size, (batch, HALF))
      tokens = np.concatenate([half, half], axis=1).astype(np.int32)
    leaves, moments, value = step(
      leaves, moments, tokens, np.float32(index + 1)
    )
    losses.append(float(value))
  return np.array(losses)
