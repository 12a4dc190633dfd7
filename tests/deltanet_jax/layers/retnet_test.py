"""RetNet against its parallel form (arXiv 2307.08621, equation 5)."""

import numpy as np
import pytest

from deltanet_jax.layers import retnet
from tests import layer_testing as lt


def _expected(p, x, layer):
  q, k, v = (lt.linear(p[f'{n}_proj'], x) for n in 'qkv')
  if layer.config.use_short_conv:
    q, k, v = (
      lt.silu(lt.conv(p[f'{n}_conv'], y))
      for n, y in zip('qkv', (q, k, v), strict=True)
    )
  q, k, v = (lt.heads(y) for y in (q, k, v))
  half = q.shape[-1] // 2
  angles = np.arange(len(x))[:, None] * 10_000.0 ** -(np.arange(half) / half)
  phase = np.exp(1j * angles)[:, None]
  q, k = ((y[..., :half] + 1j * y[..., half:]) * phase for y in (q, k))
  lag = np.arange(len(x))[:, None] - np.arange(len(x))[None]
  gamma = 1 - 2.0 ** (-5 - np.arange(lt.HEADS))
  decay = np.where(lag >= 0, gamma[:, None, None] ** np.maximum(lag, 0), 0)
  weights = np.einsum('thk,shk->hts', q, k.conj()).real * decay
  o = np.einsum('hts,shv->thv', weights / np.sqrt(2 * half), v)
  o = lt.rms_norm(p['head_norm'], o).reshape(len(x), -1)
  return lt.linear(p['o_proj'], o * lt.silu(lt.linear(p['gate_proj'], x)))


@pytest.mark.parametrize(
  'options', [{}, {'use_short_conv': True, 'value_expansion': 1}]
)
def test_equals_the_parallel_form(options):
  lt.assert_equals(retnet.RetNet, _expected, options)


def test_options_are_checked():
  with pytest.raises(ValueError, match='rope_base must be above 0, got 0'):
    retnet.RetNetConfig(rope_base=0.0)
