"""The block is pre-norm and residual."""

from flax import nnx
import jax
import numpy as np

from deltanet_jax import block as block_lib
from deltanet_jax import config as config_lib

CONFIG = config_lib.ModelConfig(
  model_width=8, num_heads=2, mlp_width=12, num_layers=1, dtype='float32'
)


def test_two_residual_branches():
  block = block_lib.Block('delta_net', CONFIG, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  y, cache = block(x)
  middle = x + block.mixer(block.mixer_norm(x))[0]
  expected = middle + block.mlp(block.mlp_norm(middle))
  np.testing.assert_allclose(y, expected, rtol=1e-6)
  assert cache is None


def test_cache_and_segments_reach_the_mixer():
  block = block_lib.Block('delta_net', CONFIG, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (1, 4, 8))
  ids = np.array([[1, 1, 2, 2]], np.int32)
  y, cache = block(x, segment_ids=ids, cache=block.init_cache(1))
  np.testing.assert_allclose(y[:, 2:], block(x[:, 2:])[0], atol=1e-6)
  np.testing.assert_array_equal(cache.segment_id, [2])
