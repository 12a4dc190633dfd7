"""ABC against its equations (arXiv 2110.02488, sections 2 and 4)."""

import jax
import numpy as np
import pytest

from deltanet_jax.layers import abc
from tests import layer_testing as lt


def _expected(p, x, layer):
  q, k, v, s = (lt.heads(lt.linear(p[f'{n}_proj'], x)) for n in 'qkvs')
  half = q.shape[-1] // 2
  angles = np.arange(len(x))[:, None] * 10_000.0 ** -(np.arange(half) / half)
  phase = np.exp(1j * angles)[:, None]
  q, k = ((y[..., :half] + 1j * y[..., half:]) * phase for y in (q, k))
  q, k = (np.concatenate([y.real, y.imag], axis=-1) for y in (q, k))
  control = np.exp(np.clip(s, -layer.config.clip, layer.config.clip))
  o = np.zeros_like(v)
  for t in range(len(x)):
    # A slot holds an average over the past, weighted by its control vector.
    share = control[: t + 1] / control[: t + 1].sum(0)  # [t + 1, H, M]
    keys = np.einsum('shm,shk->hmk', share, k[: t + 1])
    values = np.einsum('shm,shv->hmv', share, v[: t + 1])
    logits = np.einsum('hk,hmk->hm', q[t], keys) / np.sqrt(2 * half)
    weights = np.exp(logits)
    weights /= weights.sum(-1, keepdims=True)
    o[t] = np.einsum('hm,hmv->hv', weights, values)
  o = lt.rms_norm(p['head_norm'], o).reshape(len(x), -1)
  return lt.linear(p['o_proj'], o * lt.silu(lt.linear(p['gate_proj'], x)))


@pytest.mark.parametrize(
  'options', [{'num_slots': 3}, {'num_slots': 2, 'clip': 0.5}]
)
def test_equals_the_equations(options):
  lt.assert_equals(abc.ABC, _expected, options, head_dim=8)


def test_cumulative_logsumexp_starts_afresh_at_resets():
  x = np.random.default_rng(0).normal(size=(1, 5, 2)).astype(np.float32)
  before = np.array([[0.3, -2.0]], np.float32)
  resets = np.array([[False, False, True, False, False]])
  actual = jax.jit(abc.cumulative_logsumexp)(x, before, resets)[0]
  weights = np.exp(x[0].astype(np.float64))
  expected = np.log(
    np.concatenate(
      [
        np.exp(before) + np.cumsum(weights[:2], 0),
        np.cumsum(weights[2:], 0),
      ]
    )
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_options_are_checked():
  with pytest.raises(ValueError, match='clip must be above 0, got 0'):
    abc.ABCConfig(clip=0.0)
