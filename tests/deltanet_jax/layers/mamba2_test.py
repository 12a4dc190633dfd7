"""Mamba-2 against its recurrence (arXiv 2405.21060, sections 5 and 7)."""

import numpy as np
import pytest

from deltanet_jax.layers import mamba2
from tests import layer_testing as lt


def _expected(p, x, layer):
  config = layer.config
  streams = [lt.linear(p[f'{n}_proj'], x) for n in ('u', 'b', 'c')]
  bounds = np.cumsum([y.shape[1] for y in streams])[:-1]
  joined = np.concatenate(streams, axis=1)
  if config.use_short_conv:
    joined = lt.conv(p['conv'], joined)
  u, b, c = np.split(lt.silu(joined), bounds, axis=1)
  u = lt.heads(u)
  b, c = (
    np.repeat(
      lt.heads(y, config.num_groups), lt.HEADS // config.num_groups, axis=1
    )
    for y in (b, c)
  )
  dt = lt.softplus(lt.linear(p['dt_proj'], x) + p['dt_bias'])
  decay = np.exp(-dt * np.exp(p['a_log']))

  def update(state, t, h):
    return decay[t, h] * state + np.outer(b[t, h], dt[t, h] * u[t, h])

  o = lt.recurrence(update, c, (config.state_size, u.shape[-1]))
  o = (o + p['skip'][:, None] * u).reshape(len(x), -1)
  o = lt.rms_norm(p['norm'], o * lt.silu(lt.linear(p['z_proj'], x)))
  return lt.linear(p['o_proj'], o)


@pytest.mark.parametrize(
  'options',
  [
    {'state_size': 5},
    {'state_size': 3, 'num_groups': 2, 'expansion': 1},
    {'state_size': 4, 'use_short_conv': False},
  ],
)
def test_equals_the_equations(options):
  lt.assert_equals(mamba2.Mamba2, _expected, options)


def test_groups_must_divide_the_heads():
  with pytest.raises(ValueError, match='multiple of num_groups, got 2 and 3'):
    lt.build(mamba2.Mamba2, {'num_groups': 3})
