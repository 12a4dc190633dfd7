"""Every rule of the configuration is enforced, every default filled in."""

import pytest

from deltanet_jax import config
from deltanet_jax.layers import delta_net


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'vocab_size': 0}, 'vocab_size must be at least 1, got 0'),
    ({'num_layers': 0}, 'num_layers must be at least 1, got 0'),
    ({'num_heads': 0}, 'num_heads must be at least 1, got 0'),
    ({'mlp_width': -1}, 'mlp_width must be at least 0, got -1'),
    ({'norm_eps': 0.0}, 'norm_eps must be above 0'),
    ({'dtype': 'float16'}, 'dtype must be one of bfloat16, float32'),
    (
      {'remat': 'some'},
      'remat must be one of none, dots, mixer, offload, full',
    ),
    ({'mixers': ()}, 'num_layers must be a multiple'),
    ({'num_layers': 3, 'mixers': ('a', 'b')}, 'num_layers must be a multiple'),
    ({'model_width': 20}, 'model_width must be a multiple of num_heads'),
  ],
)
def test_model_config_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    config.ModelConfig(**fields)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'conv_width': 0}, 'conv_width must be at least 1, got 0'),
    ({'chunk_size': -1}, 'chunk_size must be at least 0, got -1'),
    ({'feature_map': 'tanh'}, "feature_map must be one of .* got 'tanh'"),
    ({'qk_norm': 'sum'}, "qk_norm must be one of l2, l1, got 'sum'"),
  ],
)
def test_delta_net_config_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    delta_net.DeltaNetConfig(**fields)


@pytest.mark.parametrize(
  ('width', 'expected'), [(96, 256), (1024, 2816), (1536, 4096), (2048, 5632)]
)
def test_mlp_width_is_a_multiple_of_256(width, expected):
  model = config.ModelConfig(model_width=width)
  assert model.resolved_mlp_width == expected


def test_resolved_sizes():
  model = config.ModelConfig(
    model_width=20, head_dim=3, mlp_width=7, num_layers=6, mixers=('a', 'b')
  )
  assert model.resolved_head_dim == 3
  assert model.resolved_mlp_width == 7
  assert model.num_repeats == 3
  assert config.ModelConfig().resolved_head_dim == 128


@pytest.mark.parametrize(
  ('mixers', 'layers', 'runs', 'repeats'),
  [
    (('a',), 4, (('a', 1),), 4),
    (('a', 'a'), 4, (('a', 1),), 4),
    (('a', 'b'), 4, (('a', 1), ('b', 1)), 2),
    (('a', 'a', 'b', 'a'), 8, (('a', 2), ('b', 1), ('a', 1)), 2),
  ],
)
def test_runs_of_equal_mixers(mixers, layers, runs, repeats):
  model = config.ModelConfig(num_layers=layers, mixers=mixers)
  assert model.runs == runs
  assert model.num_repeats == repeats


def test_only_attention_limits_the_cache():
  assert config.ModelConfig().max_cached_tokens is None
  hybrid = config.ModelConfig(mixers=('delta_net', 'attention'))
  assert hybrid.max_cached_tokens == 2048
