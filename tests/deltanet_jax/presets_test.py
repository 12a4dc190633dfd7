"""The presets have the sizes of the paper's models."""

import jax
import numpy as np
import pytest

import deltanet_jax
from deltanet_jax import presets

EXACT = {'340m': 374_362_112, '1b': 1_365_677_056}


@pytest.mark.parametrize('size', EXACT)
def test_delta_net_has_exactly_the_paper_s_parameters(size):
  config = presets.preset('delta_net', size)
  assert deltanet_jax.count_parameters(config) == EXACT[size]
  assert config.resolved_head_dim == 128


def test_functions_are_the_presets():
  assert deltanet_jax.delta_net_340m() == presets.preset('delta_net', '340m')
  assert deltanet_jax.delta_net_1b() == presets.preset('delta_net', '1b')


@pytest.mark.parametrize('size', ['340m', '1b', '3b', '7b'])
def test_baselines_are_as_large_as_delta_net(size):
  counts = {
    name: deltanet_jax.count_parameters(presets.preset(name, size))
    for name in presets.NAMES
  }
  for name, count in counts.items():
    assert abs(count / counts['delta_net'] - 1) < 0.02, (name, counts)


# Numbers per layer of the state, in multiples of the model's width.
STATES = {
  ('delta_net', '340m'): 128,
  ('delta_net', '1b'): 128,
  ('gla', '340m'): 128,
  ('gla', '1b'): 256,
  ('retnet', '340m'): 512,
  ('retnet', '1b'): 512,
  # Two layers of Mamba stand for one of the others.
  ('mamba', '340m'): 64 / 2,
  ('mamba', '1b'): 64 / 2,
}


@pytest.mark.parametrize(('name', 'size'), STATES)
def test_state_is_the_paper_s_multiple_of_the_width(name, size):
  config = presets.preset(name, size)
  cache = jax.eval_shape(lambda: deltanet_jax.init_cache(config, 1))
  state = cache['block_0'].state  # [layers, 1, ...]
  numbers = np.prod(state.shape) / config.num_layers
  assert numbers == STATES[name, size] * config.model_width


def test_global_attention_is_in_layers_2_and_13_of_24():
  mixers = presets.preset('delta_net_global', '340m').mixers
  positions = [i + 1 for i, name in enumerate(mixers) if name == 'attention']
  assert positions == [2, 13]
  assert len(mixers) == 24


@pytest.mark.parametrize('name', presets.NAMES)
def test_tiny_ones_run(name):
  config = presets.preset(name, 'tiny')
  params = deltanet_jax.init(config, jax.random.key(0))
  tokens = np.arange(6).reshape(1, 6)
  logits, _ = jax.jit(lambda p: deltanet_jax.apply(config, p, tokens))(params)
  assert logits.shape == (1, 6, 256)
  assert np.all(np.isfinite(logits))


def test_unknown_names_and_sizes_are_refused():
  with pytest.raises(ValueError, match="one of delta_net, .* got 'bert'"):
    presets.preset('bert', '1b')
  with pytest.raises(ValueError, match="one of tiny, .* got '13b'"):
    presets.preset('gla', '13b')
