import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import config as config_lib
from experiments.training import spike_guard

CONFIG = config_lib.TrainingConfig(spike_window=8, spike_sigmas=6.0)
HISTORY = [2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.1, 1.9]
MEAN, STD = np.mean(HISTORY), np.std(HISTORY)
LOG_MEAN, LOG_STD = np.mean(np.log(HISTORY)), np.std(np.log(HISTORY))


def judge(state, loss, gradient_norm=1.0, config=CONFIG):
  accepted, state = spike_guard.judge(
    state, jnp.float32(loss), jnp.float32(gradient_norm), config
  )
  return bool(accepted), state


def after(losses, norms=None):
  state = spike_guard.init(CONFIG)
  for loss, norm in zip(losses, norms or losses, strict=True):
    accepted, state = judge(state, loss, norm)
    assert accepted
  return state


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('warm', [False, True])
def test_what_is_not_finite_is_refused_at_any_time(value, warm):
  state = after(HISTORY if warm else [])
  assert not judge(state, value, 2.0)[0]
  assert not judge(state, 2.0, value)[0]


@pytest.mark.parametrize('sigmas', [3.0, 6.0])
def test_the_limit_lies_that_many_sigmas_above_the_mean(sigmas):
  config = config_lib.TrainingConfig(spike_window=8, spike_sigmas=sigmas)
  state = after(HISTORY)
  for factor, expected in ((0.99 * sigmas, True), (1.01 * sigmas, False)):
    loss = MEAN + factor * STD
    norm = np.exp(LOG_MEAN + factor * LOG_STD)
    assert judge(state, loss, 2.0, config)[0] == expected
    assert judge(state, 2.0, norm, config)[0] == expected


@pytest.mark.parametrize('sigma', [0.3, 0.4, 0.5])
def test_heavy_tailed_norms_are_accepted_and_spikes_of_them_refused(sigma):
  draw = np.random.default_rng(0)
  config = config_lib.TrainingConfig()
  median = 0.7
  norms = draw.lognormal(np.log(median), sigma, 10_000).astype(np.float32)
  losses = draw.normal(3, 0.3, norms.size).astype(np.float32)

  def step(state, values):
    spiked, _ = spike_guard.judge(state, values[0], 100 * median, config)
    accepted, state = spike_guard.judge(state, *values, config)
    return state, (accepted, spiked)

  _, (accepted, spiked) = jax.lax.scan(
    step, spike_guard.init(config), (losses, norms)
  )
  assert accepted.mean() > 0.999
  assert not spiked[config.spike_window :].any()


def test_a_norm_of_zero_is_accepted_and_leaves_the_limit_as_it_was():
  _, state = judge(after(HISTORY[:7]), 2.0, 0.0)
  accepted, state = judge(state, 2.0, 2.0)
  assert accepted
  assert not judge(state, 2.0, 10.0)[0]


def test_a_fall_is_no_spike():
  assert judge(after(HISTORY), -100.0, 0.0)[0]


def test_nothing_is_a_spike_before_the_window_is_full():
  state = after(HISTORY[:7])
  assert judge(state, 1e6)[0]
  assert not judge(after(HISTORY), 1e6)[0]


def test_what_is_refused_does_not_enter_the_history():
  state = after(HISTORY)
  for value in (1e6, np.nan, np.inf):
    accepted, refused = judge(state, value)
    assert not accepted
    np.testing.assert_array_equal(refused['history'], state['history'])
    assert refused['num_accepted'] == state['num_accepted']


def test_the_window_forgets_its_oldest_value():
  state = after([100.0, *HISTORY[1:]])
  limit_with_it = np.mean([100.0, *HISTORY[1:]])
  assert judge(state, limit_with_it, 2.0)[0]
  _, state = judge(state, 2.0, 2.0)
  assert not judge(state, limit_with_it, 2.0)[0]
  np.testing.assert_allclose(state['history'], [HISTORY, HISTORY])


def test_refused_steps_are_counted_in_all_and_in_a_row():
  state = after(HISTORY)
  counts = []
  for loss in (np.nan, 1e6, 2.0, np.inf):
    _, state = judge(state, loss)
    counts.append((int(state['refused_in_a_row']), int(state['num_refused'])))
  assert counts == [(1, 1), (2, 2), (0, 2), (1, 3)]


def test_a_tree_is_selected_bit_for_bit():
  old = {'a': jnp.array([1.0, -0.0]), 'b': [jnp.int32(3)]}
  new = {'a': jnp.array([jnp.nan, jnp.inf]), 'b': [jnp.int32(4)]}
  for accepted, expected in ((True, new), (False, old)):
    found = spike_guard.select(jnp.bool(accepted), new, old)
    assert found['a'].tobytes() == expected['a'].tobytes()
    assert found['b'] == expected['b']
