"""Slots: the recurrence over documents, as both users of it rely on."""

from flax import nnx
import numpy as np

from deltanet_jax.layers import gsa
from deltanet_jax.layers import recurrence
from deltanet_jax.layers import slot_attention
from tests import slots

RANDOM = np.random.default_rng(0)


def test_attends_in_every_document_alone():
  layer = gsa.GSA(8, 2, config=gsa.GSAConfig(num_slots=3), rngs=nnx.Rngs(0))
  q, k, v = RANDOM.normal(size=(3, 1, 6, 2, 4)).astype(np.float32)
  write, alpha = RANDOM.uniform(0.1, 1, (2, 1, 6, 2, 3)).astype(np.float32)
  ids = np.array([[1, 1, 1, 2, 2, 2]], np.int32)
  past = recurrence.Past(layer, np.zeros((1, 6, 8)), ids, None)
  o = slot_attention.attend(past, q, k, v, write, np.log(alpha), scale=None)
  expected = [
    slots.attend(*(y[0, piece] for y in (q, k, v, write, alpha)), scale=4**-0.5)
    for piece in (slice(0, 3), slice(3, 6))
  ]
  np.testing.assert_allclose(o[0], np.concatenate(expected), atol=1e-5)
  assert past.state.keys.shape == (1, 6, 4, 1)
