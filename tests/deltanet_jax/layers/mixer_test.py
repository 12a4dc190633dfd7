"""What every mixer refuses."""

from flax import nnx
import numpy as np
import pytest

from deltanet_jax.layers import delta_net
from deltanet_jax.layers import options

X = np.zeros((2, 3, 8), np.float32)


def _mixer(**arguments):
  return delta_net.DeltaNet(8, 2, rngs=nnx.Rngs(0), **arguments)


def test_refuses_a_config_of_another_mixer():
  with pytest.raises(ValueError, match='config must be a DeltaNetConfig'):
    _mixer(config=options.RecurrenceConfig())


def test_refuses_an_unknown_dtype():
  with pytest.raises(ValueError, match='dtype must be one of bfloat16, float3'):
    _mixer(dtype='float16')


@pytest.mark.parametrize(
  ('x', 'segment_ids', 'message'),
  [
    (X[0], None, r'x must be \[B, T, 8\], got \(3, 8\)'),
    (X[..., :5], None, r'x must be \[B, T, 8\], got \(2, 3, 5\)'),
    (X, np.ones((2, 4), np.int32), r'segment_ids must be .* got \(2, 4\)'),
  ],
)
def test_refuses_arrays_that_do_not_fit(x, segment_ids, message):
  with pytest.raises(ValueError, match=message):
    _mixer()(x, segment_ids=segment_ids)


def test_refuses_a_cache_of_another_batch_or_mixer():
  mixer = _mixer()
  with pytest.raises(ValueError, match=r'cache must be what init_cache\(2\)'):
    mixer(X, cache=mixer.init_cache(3))
  with pytest.raises(ValueError, match=r'cache must be what init_cache\(2\)'):
    mixer(X, cache=_mixer(head_dim=3).init_cache(2))
