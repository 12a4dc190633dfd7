"""Runs that two CPU cores finish, on text that every machine has."""

import deltanet_jax
from experiments import config as config_lib


def laptop() -> config_lib.TrainLMConfig:
  """A byte model of 0.9 M parameters, 3.5 M tokens: `make train`.

  python -m experiments.train_lm --config=laptop --workdir=runs/laptop

  Eight minutes on two CPU cores; expected: 1.96 bits per byte of the held-out
  text. Its size and rate were chosen by the validation text.
  """
  return config_lib.TrainLMConfig(
    model=deltanet_jax.ModelConfig(
      vocab_size=257,
      model_width=128,
      num_layers=4,
      num_heads=4,
      mlp_width=352,
    ),
    data=config_lib.DataConfig(sequence_length=256, batch_size=4),
    optimizer=config_lib.OptimizerConfig(
      peak_learning_rate=3e-3,
      initial_learning_rate=0.0,
      final_learning_rate=3e-5,
      warmup_steps=200,
      weight_decay=0.1,
    ),
    training=config_lib.TrainingConfig(num_steps=3400, log_every_steps=20),
    evaluation=config_lib.EvaluationConfig(
      every_steps=500, num_tokens=32_768, context_length=1024
    ),
    checkpoint=config_lib.CheckpointConfig(every_steps=500),
  )


def laptop_long() -> config_lib.TrainLMConfig:
  """A model of 5.3 M parameters over 4096 byte pairs, 7 M tokens.

  Its tokenizer is trained first, on the documents of the train split:

  python -m experiments.train_tokenizer --vocab_size=4096
  --output=runs/laptop_tokenizer.json
  python -m experiments.train_lm --config=laptop_long --workdir=runs/laptop_long

  An hour on two CPU cores; expected: 1.33 bits per byte of the validation
  text. Windows of 512 tokens in half as many steps reach 1.41.
  """
  return config_lib.TrainLMConfig(
    model=deltanet_jax.ModelConfig(
      vocab_size=4096,
      model_width=256,
      num_layers=4,
      num_heads=4,
      mlp_width=704,
    ),
    data=config_lib.DataConfig(
      tokenizer='runs/laptop_tokenizer.json', sequence_length=256, batch_size=4
    ),
    optimizer=config_lib.OptimizerConfig(
      peak_learning_rate=3e-3,
      initial_learning_rate=0.0,
      final_learning_rate=3e-5,
      warmup_steps=200,
      b2=0.99,
      weight_decay=0.1,
    ),
    training=config_lib.TrainingConfig(num_steps=6800, log_every_steps=20),
    evaluation=config_lib.EvaluationConfig(
      every_steps=850, num_tokens=32_768, context_length=1024
    ),
    checkpoint=config_lib.CheckpointConfig(every_steps=400),
  )
