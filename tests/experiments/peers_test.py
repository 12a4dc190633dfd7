import importlib
import types

import jax.numpy as jnp
import pytest

from experiments import benchmark_cases
from experiments import peers
import pallas_kernels

CASE = benchmark_cases.Case(
  op='delta_rule', gate='head', name='tiny', B=1, T=16, H=2, K=8, V=8
)
OURS = peers.PEERS[0]


def _peer(function, package='peer'):
  return peers.Peer(package, 'op', lambda: function, 'pip install peer')


def _rows(*others):
  return list(peers.rows(CASE, repeats=1, peers=(OURS, *others)))


def test_a_peer_that_computes_the_same_is_timed():
  def recurrent(**arguments):
    return pallas_kernels.delta_rule(**arguments, implementation='recurrent')

  ours, row = _rows(_peer(recurrent))
  assert ours['times_ours'] == 1
  assert row['times_ours'] == row['median_ms'] / ours['median_ms']
  assert 0 < row['difference'] < 1e-5
  assert 'times ours' in peers.format_row(row)


@pytest.mark.parametrize('scale', [2.0, jnp.nan])
def test_a_peer_that_computes_something_else_is_not_timed(scale):
  def other(**arguments):
    o, state = pallas_kernels.delta_rule(**arguments)
    return scale * o, state

  row = _rows(_peer(other))[1]
  assert 'median_ms' not in row
  assert row['reason'].startswith('it differs from ours by ')


def test_our_decay_per_channel_is_the_one_per_head():
  row = _rows(peers.PEERS[1])[1]
  assert row['difference'] < 1e-5


@pytest.mark.parametrize('peer', peers.PEERS[2:], ids=lambda p: p.package)
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, peer):
  def missing(name):
    raise ModuleNotFoundError(f'No module named {name!r}')

  monkeypatch.setattr(importlib, 'import_module', missing)
  row = _rows(peer)[1]
  assert peer.package in row['reason']
  assert peer.install in row['reason']
  assert peers.format_row(row).endswith(f'not timed: {row["reason"]}')


def test_a_package_without_the_op_says_so(monkeypatch):
  monkeypatch.setattr(
    importlib, 'import_module', lambda name: types.SimpleNamespace()
  )
  ejkernel = peers.PEERS[-1]
  assert 'has no gated delta rule' in _rows(ejkernel)[1]['reason']


def test_tokamax_gets_heads_first_and_a_gate_that_gives_g(monkeypatch):
  given = {}

  def kimi_delta_attention(query, key, value, gate, beta, **options):
    given.update(options, gate=gate)
    o, state = pallas_kernels.delta_rule(
      *(jnp.moveaxis(x, 0, 2) for x in (query, key, value, beta)),
      jnp.moveaxis(options['lower_bound'] / (1 + jnp.exp(-gate)), 0, 2),
    )
    return jnp.moveaxis(o, 2, 0), state[:, None]

  module = types.SimpleNamespace(kimi_delta_attention=kimi_delta_attention)
  monkeypatch.setattr(importlib, 'import_module', lambda name: module)
  row = _rows(peers.PEERS[2])[1]
  assert row['difference'] < 1e-5
  assert given['implementation'] == 'xla_chunked'
  assert given['gate'].shape == (2, 1, 16, 8)


def test_difference_is_the_greatest_of_the_leaves():
  found = {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([3.0, 3.3])}
  expected = {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([3.0, 3.0])}
  assert peers.difference(found, expected) == pytest.approx(0.1 / 2**0.5)
  with pytest.raises(ValueError, match='shapes must be equal'):
    peers.difference(jnp.ones(2), jnp.ones(3))
