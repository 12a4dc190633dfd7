import dataclasses

import pytest

import deltanet_jax
from experiments import config as config_lib
from experiments import mesh_traffic

LAYERS, WIDTH, HEADS, VOCAB, ROWS, LENGTH = 2, 8, 2, 16, 4, 32


def _config(**changes):
  model = {
    'vocab_size': VOCAB,
    'model_width': WIDTH,
    'num_layers': LAYERS,
    'num_heads': HEADS,
    'mlp_width': 16,
    'dtype': 'float32',
  }
  return config_lib.TrainLMConfig(
    model=deltanet_jax.ModelConfig(**model | changes),
    data=config_lib.DataConfig(batch_size=ROWS, sequence_length=LENGTH),
  )


ENDS = 2 * VOCAB * WIDTH
# q, k, v, o; three of the MLP; beta.
MATRICES = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * 16 + WIDTH * HEADS)
# Convolutions; norms of mixer, MLP and head.
SMALL = LAYERS * (3 * 4 * WIDTH + 2 * WIDTH + WIDTH // HEADS) + WIDTH


@pytest.mark.parametrize(
  ('axis', 'devices', 'numbers'),
  [
    ('data', 4, 1.5 * (ENDS + MATRICES + SMALL)),
    ('dcn_data', 2, ENDS + MATRICES + SMALL),
    ('fsdp', 4, 0.75 * (2 * ENDS + 4 * MATRICES + 2 * SMALL)),
    ('tensor', 2, ROWS * LENGTH * (WIDTH * (2 + 8 * LAYERS) + 3)),
    (
      'sequence',
      8,
      0.875 * (2 * ENDS + 4 * MATRICES + 2 * SMALL)
      + 2 * LAYERS * ROWS * (3 * HEADS * 4 * 8 + 3 * WIDTH * 3),
    ),
  ],
)
def test_numbers_counted_by_hand(axis, devices, numbers):
  found = mesh_traffic.sent_bytes(_config(), axis, devices)
  assert found == pytest.approx(4 * numbers)


@pytest.mark.parametrize('axis', ['fsdp', 'sequence'])
def test_a_reduce_scatter_sends_the_blocks_gradients_once_less(axis):
  summed = mesh_traffic.sent_bytes(_config(), axis, 4)
  found = mesh_traffic.sent_bytes(_config(), axis, 4, reduce_scatter=True)
  assert summed - found == pytest.approx(4 * 0.75 * MATRICES)


@pytest.mark.parametrize(
  'changes',
  [
    {'mixers': ('attention',)},
    {'dtype': 'bfloat16'},
    {'remat': 'full'},
    {'tie_embeddings': True},
  ],
)
def test_other_models_are_refused(changes):
  with pytest.raises(ValueError, match='the formula is for delta_net'):
    mesh_traffic.sent_bytes(_config(**changes), 'fsdp', 2)


def test_accumulation_and_other_axes_are_refused():
  run = _config()
  with pytest.raises(ValueError, match="named 'pipeline'"):
    mesh_traffic.sent_bytes(run, 'pipeline', 2)
  training = config_lib.TrainingConfig(gradient_accumulation_steps=2)
  run = dataclasses.replace(run, training=training)
  with pytest.raises(ValueError, match='gradient_accumulation_steps=1, got 2'):
    mesh_traffic.sent_bytes(run, 'fsdp', 2)
