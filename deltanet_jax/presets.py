"""The model sizes of the paper (arXiv 2406.06484, section 4 and appendix)."""

from deltanet_jax import config


def delta_net_340m() -> config.ModelConfig:
  """Returns DeltaNet 340M: 374,362,112 parameters, vocabulary 32,000."""
  return config.ModelConfig(
    vocab_size=32_000, model_width=1024, num_layers=24, num_heads=8
  )


def delta_net_1b() -> config.ModelConfig:
  """Returns DeltaNet 1.3B: 1,365,677,056 parameters, vocabulary 32,000."""
  return config.ModelConfig(
    vocab_size=32_000, model_width=2048, num_layers=24, num_heads=16
  )
