"""The long convolution against its sum: documents, pieces, filters cut off."""

import jax
import numpy as np
import pytest

from deltanet_jax.layers import long_conv

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 13, 3)).astype(np.float32)
IDS = np.array(
  [[1] * 5 + [2] + [1] * 6 + [0], [0, 0] + [7] * 3 + [0] + [7] * 2 + [8] * 5],
  np.int32,
)


def _expected(x, h, ids):
  """Sums tap by tap; a run ends where another id begins."""
  y = np.zeros(x.shape)
  for row in range(len(x)):
    for t in range(x.shape[1]):
      for s in range(t, max(t - len(h), -1), -1):
        if ids[row, s] not in (0, ids[row, t]) or not ids[row, t]:
          break
        if ids[row, s]:
          y[row, t] += h[t - s] * x[row, s]
  return y


@pytest.mark.parametrize('length', [1, 4, 13, 40])
@pytest.mark.parametrize('packed', [False, True])
def test_equals_the_sum(length, packed):
  h = RANDOM.normal(size=(length, 3)).astype(np.float32)
  ids = IDS if packed else np.ones_like(IDS)
  y, cache = long_conv.run(
    X, h, expand=lambda x: x, segment_ids=ids if packed else None, cache=None
  )
  np.testing.assert_allclose(y, _expected(X, h, ids), atol=1e-5)
  assert cache is None


@pytest.mark.parametrize('pieces', [(1,) * 13, (4, 1, 8), (13,)])
def test_pieces_equal_the_sum(pieces):
  h = RANDOM.normal(size=(6, 3)).astype(np.float32)
  cache, start, outputs = long_conv.empty_cache(2, 6, 3, 'float32'), 0, []
  for length in pieces:
    piece = slice(start, start + length)
    y, cache = long_conv.run(
      X[:, piece],
      h,
      expand=lambda x: x,
      segment_ids=IDS[:, piece],
      cache=cache,
    )
    outputs.append(y)
    start += length
  expected = _expected(X, h, IDS)
  np.testing.assert_allclose(np.concatenate(outputs, 1), expected, atol=1e-5)


def test_documents_do_not_see_the_future_at_all():
  h = RANDOM.normal(size=(13, 3)).astype(np.float32)
  convolve = jax.jit(long_conv.convolve_segments)
  changed = X.copy()
  changed[:, 8:] += 1
  np.testing.assert_array_equal(
    convolve(X, h, IDS)[:, :8], convolve(changed, h, IDS)[:, :8]
  )
