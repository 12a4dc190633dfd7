"""The language models of the paper (appendix A.1 and table 1).

Data and tokenizer of the paper are a subset of SlimPajama under the Mistral
tokenizer; tokenise it once with `experiments.tokenize_text` and name the store
with `--data.store`. The betas and epsilon of AdamW are not in the paper; those
here are the defaults of `OptimizerConfig`.
"""

import deltanet_jax
from experiments import config as config_lib


def delta_net_340m() -> config_lib.TrainLMConfig:
  """DeltaNet 340M, 15B tokens: 28,610 steps of 256 x 2048 tokens.

  python -m experiments.train_lm --config=delta_net_340m --workdir=DIR
  --data.store=STORE --data.tokenizer=tokenizer.json, in the paper on 8 H100.
  Expected: WikiText perplexity 28.24, LAMBADA accuracy 32.1.
  """
  return config_lib.TrainLMConfig(
    model=deltanet_jax.delta_net_340m(),
    data=config_lib.DataConfig(sequence_length=2048, batch_size=256),
    optimizer=config_lib.OptimizerConfig(warmup_steps=954),
    training=config_lib.TrainingConfig(num_steps=28_610),
  )


def delta_net_1b() -> config_lib.TrainLMConfig:
  """DeltaNet 1.3B, 100B tokens: 47,684 steps of 1024 x 2048 tokens.

  python -m experiments.train_lm --config=delta_net_1b --workdir=DIR
  --data.store=STORE --data.tokenizer=tokenizer.json, in the paper on 8 H100.
  Expected: WikiText perplexity 16.87, LAMBADA accuracy 48.9.
  """
  return config_lib.TrainLMConfig(
    model=deltanet_jax.delta_net_1b(),
    data=config_lib.DataConfig(sequence_length=2048, batch_size=1024),
    optimizer=config_lib.OptimizerConfig(warmup_steps=477),
    training=config_lib.TrainingConfig(num_steps=47_684),
  )
