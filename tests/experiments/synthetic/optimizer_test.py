"""Tests of AdamW and its schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.synthetic import config as config_lib
from experiments.synthetic import optimizer

TRAINING = config_lib.TrainingConfig(
  num_train=40, batch_size=10, num_epochs=5, warmup_steps=0
)


def _factors(**changes):
  config = dataclasses.replace(TRAINING, **changes)
  steps = jnp.arange(config.num_epochs * config.steps_per_epoch)
  return np.array([optimizer.rate_factor(config, step) for step in steps])


def test_constant_rate_rises_and_stays():
  np.testing.assert_allclose(
    _factors(schedule='constant', warmup_steps=3)[:6],
    [1 / 4, 2 / 4, 3 / 4, 1, 1, 1],
  )


def test_cosine_by_epoch_stays_within_an_epoch():
  got = _factors(schedule='cosine_by_epoch').reshape(5, 4)
  expected = 0.5 * (1 + np.cos(np.pi * np.arange(5) / 5))
  np.testing.assert_allclose(got, np.tile(expected[:, None], 4), atol=1e-6)


def test_cosine_by_step_ends_at_its_final_ratio():
  got = _factors(schedule='cosine', warmup_steps=4, final_ratio=0.1)
  end = optimizer.rate_factor(
    dataclasses.replace(
      TRAINING, schedule='cosine', warmup_steps=4, final_ratio=0.1
    ),
    jnp.array(20),
  )
  assert got[4] == pytest.approx(1)
  assert np.all(np.diff(got[4:]) < 0)
  assert float(end) == pytest.approx(0.1)


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.parametrize('clip_norm', [0.0, 0.5])
def test_steps_equal_optax(clip_norm):
  config = dataclasses.replace(TRAINING, clip_norm=clip_norm, b2=0.99)
  params = {'a': jnp.array([1.0, -2.0]), 'b': jnp.array([[0.5]])}
  gradients = {'a': jnp.array([3.0, 0.1]), 'b': jnp.array([[-1.0]])}
  state = optimizer.init(
    config,
    params,
    key=jax.random.key(0),
    learning_rate=jnp.float32(0.1),
    weight_decay=jnp.float32(0.3),
  )
  peer = optax.chain(
    optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
    optax.adamw(0.1, b2=0.99, weight_decay=0.3),
  )
  moments = peer.init(params)
  for _ in range(3):
    state = optimizer.update(config, state, gradients)
    updates, moments = peer.update(gradients, moments, params)
    params = optax.apply_updates(params, updates)
  assert int(state.step) == 3
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
    state.params,
    params,
  )
