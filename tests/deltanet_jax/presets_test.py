"""The presets have the sizes of the paper's models."""

import pytest

import deltanet_jax


@pytest.mark.parametrize(
  ('preset', 'expected'),
  [
    (deltanet_jax.delta_net_340m, 374_362_112),
    (deltanet_jax.delta_net_1b, 1_365_677_056),
  ],
)
def test_parameter_count(preset, expected):
  assert deltanet_jax.count_parameters(preset()) == expected


@pytest.mark.parametrize(
  'preset', [deltanet_jax.delta_net_340m, deltanet_jax.delta_net_1b]
)
def test_heads_are_128_wide(preset):
  assert preset().resolved_head_dim == 128
