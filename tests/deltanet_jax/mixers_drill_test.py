"""Every mixer learns to copy: 200 steps, other tokens at every one."""

import dataclasses

import jax
import numpy as np
import pytest

from deltanet_jax import config as config_lib
from deltanet_jax import language_model
from deltanet_jax import mixers
from tests import copy_task

STEPS = 200


@pytest.mark.drill
@pytest.mark.parametrize('name', sorted(mixers.MIXERS))
def test_loss_falls_on_a_copy_task(name):
  config = config_lib.ModelConfig(
    vocab_size=8,
    model_width=32,
    num_layers=2,
    num_heads=2,
    mlp_width=64,
    mixers=(name,),
    dtype='float32',
  )
  if hasattr(getattr(config, name), 'filter_length'):
    options = dataclasses.replace(getattr(config, name), filter_length=16)
    config = dataclasses.replace(config, **{name: options})
  losses = copy_task.train(
    config,
    language_model.init(config, jax.random.key(0)),
    jax.jit,
    num_steps=STEPS,
    learning_rate=5e-3,
    batch=32,
    fresh=True,
  )
  assert np.all(np.isfinite(losses))
  first, *_, last = losses.reshape(4, -1).mean(axis=1)
  assert last < 0.9 * np.log(8)
  assert last < 0.9 * first
