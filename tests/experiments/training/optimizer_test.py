import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deltanet_jax
from experiments import config as config_lib
from experiments.training import optimizer as optimizer_lib

CONFIG = config_lib.OptimizerConfig(
  peak_learning_rate=1e-2,
  initial_learning_rate=1e-4,
  final_learning_rate=1e-3,
  warmup_steps=10,
)
MODEL = deltanet_jax.ModelConfig(
  vocab_size=17,
  model_width=8,
  num_layers=2,
  num_heads=2,
  mlp_width=8,
  dtype='float32',
)

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.mark.parametrize(
  ('step', 'rate'),
  [
    (0, 1e-4),
    (5, (1e-4 + 1e-2) / 2),
    (10, 1e-2),
    (60, (1e-2 + 1e-3) / 2),
    (110, 1e-3),
    (10_000, 1e-3),
  ],
)
def test_the_rate_rises_on_a_line_and_falls_on_a_cosine(step, rate):
  schedule = optimizer_lib.learning_rate_schedule(CONFIG, 110)
  assert math.isclose(schedule(step), rate, rel_tol=1e-5)


def test_without_warm_up_the_rate_starts_at_its_peak():
  config = config_lib.OptimizerConfig(warmup_steps=0)
  schedule = optimizer_lib.learning_rate_schedule(config, 10)
  assert math.isclose(schedule(0), config.peak_learning_rate, rel_tol=1e-6)


@pytest.mark.parametrize('num_steps', [9, 10])
def test_a_warm_up_as_long_as_the_run_is_refused(num_steps):
  with pytest.raises(ValueError, match=f'got 10 and {num_steps}'):
    optimizer_lib.learning_rate_schedule(CONFIG, num_steps)


def _first_update(config, params, gradients):
  optimizer = optimizer_lib.build(config, 100)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  return updates


def test_only_the_scales_of_norms_are_not_decayed():
  config = config_lib.OptimizerConfig(weight_decay=0.5, warmup_steps=1)
  params = deltanet_jax.init(MODEL, jax.random.key(0))
  params = jax.tree.map(jnp.ones_like, params)
  updates = _first_update(config, params, jax.tree.map(jnp.zeros_like, params))
  rate = config.initial_learning_rate
  scales = 0
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    is_scale = path[-1].key == 'scale'
    scales += is_scale
    expected = 0.0 if is_scale else -rate * config.weight_decay
    np.testing.assert_allclose(
      update, np.full(update.shape, expected), rtol=1e-6
    )
  assert scales == 4  # mixer_norm, head_norm, mlp_norm, final_norm.


def test_decay_rates_and_biases_are_not_decayed():
  config = config_lib.OptimizerConfig(weight_decay=0.5, warmup_steps=1)
  model = dataclasses.replace(MODEL, mixers=('gated_delta_net',))
  params = deltanet_jax.init(model, jax.random.key(0))
  params = jax.tree.map(jnp.ones_like, params)
  updates = _first_update(config, params, jax.tree.map(jnp.zeros_like, params))
  mixer = updates['blocks']['block_0']['mixer']
  assert np.all(mixer['a_log'] == 0) and np.all(mixer['dt_bias'] == 0)
  assert np.all(mixer['a_proj']['kernel'] != 0)


def test_an_update_is_that_of_adam_written_out():
  config = config_lib.OptimizerConfig(
    b1=0.8, b2=0.6, eps=0.01, weight_decay=0.0, warmup_steps=10
  )
  optimizer = optimizer_lib.build(config, 100)
  rate = optimizer_lib.learning_rate_schedule(config, 100)
  params = {'w': jnp.zeros(1)}
  state, mean, square = optimizer.init(params), 0.0, 0.0
  for step, gradient in enumerate((0.3, -0.1, 0.2)):
    updates, state = optimizer.update(
      {'w': jnp.array([gradient])}, state, params
    )
    mean = 0.8 * mean + 0.2 * gradient
    square = 0.6 * square + 0.4 * gradient**2
    root = math.sqrt(square / (1 - 0.6 ** (step + 1)))
    expected = -rate(step) * mean / (1 - 0.8 ** (step + 1)) / (root + 0.01)
    np.testing.assert_allclose(updates['w'], [expected], rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
  config = config_lib.OptimizerConfig(
    weight_decay=0.0, warmup_steps=1, clip_norm=0.1, eps=1.0
  )
  params = {'a': {'w': jnp.zeros(1)}, 'b': {'w': jnp.zeros(1)}}
  gradients = {'a': {'w': jnp.array([30.0])}, 'b': {'w': jnp.array([-40.0])}}
  updates = _first_update(config, params, gradients)
  rate = config.initial_learning_rate
  # Adam's first update is -rate * g / (|g| + eps) of the clipped g.
  for name, clipped in (('a', 0.06), ('b', -0.08)):
    expected = -rate * clipped / (abs(clipped) + 1.0)
    np.testing.assert_allclose(updates[name]['w'], [expected], rtol=1e-5)
  assert optax.tree.norm(gradients) == 50
