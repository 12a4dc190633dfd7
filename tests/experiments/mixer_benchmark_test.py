import pytest

import deltanet_jax
from experiments import mixer_benchmark

pytestmark = pytest.mark.usefixtures('standard_promotion')

SIZES = mixer_benchmark.Sizes(
  model_width=16,
  num_layers=2,
  num_heads=2,
  batch=1,
  length=8,
  decoded=2,
  seconds=0.0,
)


@pytest.mark.parametrize('mixer', ['delta_net', 'sliding_window'])
def test_a_row_holds_sizes_and_speeds(mixer):
  (row,) = mixer_benchmark.rows(SIZES, [mixer])
  assert row['mixer'] == mixer
  assert row['trained_tokens_per_s'] > 0
  assert row['decoded_tokens_per_s'] > 0
  config = deltanet_jax.ModelConfig(
    vocab_size=256, model_width=16, num_layers=2, num_heads=2, mixers=(mixer,)
  )
  assert row['parameters'] == deltanet_jax.count_parameters(config)
  line = mixer_benchmark.format_row(row)
  assert len(line) == len(mixer_benchmark.header())
  assert line.split()[0] == mixer


def test_the_state_of_delta_net_is_its_matrix_and_convolutions():
  config = deltanet_jax.ModelConfig(
    vocab_size=256, model_width=64, num_layers=3, num_heads=2, dtype='float32'
  )
  matrix, convolutions = 2 * 32 * 32, 3 * 3 * 64
  # Beside them ids of documents: of the last token, and of 3 x 3 inputs.
  assert mixer_benchmark.state_bytes(config) == 4 * (matrix + convolutions + 10)


def test_sizes_below_1_are_refused():
  with pytest.raises(ValueError, match='length must be at least 1, got 0'):
    mixer_benchmark.Sizes(length=0)
