"""A run of seconds: one small DeltaNet layer on tiny associative recall."""

import dataclasses

import deltanet_jax
from experiments.synthetic import config as config_lib
from experiments.synthetic import mqar

TASK = mqar.MQARConfig(vocab_size=20, sequence_length=8, num_pairs=2)
RUN = config_lib.RunConfig(
  name='mqar',
  task=TASK,
  test_task=TASK,
  model=deltanet_jax.ModelConfig(
    model_width=16,
    num_layers=1,
    num_heads=1,
    mixers=('delta_net',),
    dtype='float32',
    use_mlp=False,
    delta_net=deltanet_jax.DeltaNetConfig(chunk_size=8),
  ),
  training=config_lib.TrainingConfig(
    num_train=2048,
    num_test=64,
    batch_size=32,
    num_epochs=2,
    learning_rate=2e-2,
    weight_decay=0.0,
    metric='example',
  ),
)


def with_training(**changes) -> config_lib.RunConfig:
  """Returns the run with some fields of its training changed."""
  training = dataclasses.replace(RUN.training, **changes)
  return dataclasses.replace(RUN, training=training)
