"""The peer's kernels need a GPU: here they are stood in for."""

import sys
import types

import jax.numpy as jnp
import pytest

from experiments import benchmark_cases
from experiments import fla_peer

CASE = benchmark_cases.Case(
  op='delta_rule', name='x', B=1, T=4, H=1, K=2, V=2, dtype='bfloat16'
)


def _modules(calls, available=True, error=None):
  def op(q, k, v, beta, output_final_state):
    if error:
      raise error
    calls.append((q, k, v, beta, output_final_state))
    return v, k

  torch = types.SimpleNamespace(
    bfloat16='bf16',
    float32='f32',
    OutOfMemoryError=MemoryError,
    tensor=lambda x, dtype, device, requires_grad: (
      x.shape,
      dtype,
      device,
      requires_grad,
    ),
    ones_like=lambda x: x,
    autograd=types.SimpleNamespace(
      grad=lambda *_, **options: calls.append('grad')
    ),
    cuda=types.SimpleNamespace(
      is_available=lambda: available, synchronize=lambda: calls.append('wait')
    ),
  )
  names = {'torch': torch, 'fla': types.SimpleNamespace()}
  names['fla.ops'] = types.SimpleNamespace()
  names['fla.ops.delta_rule'] = types.SimpleNamespace(chunk_delta_rule=op)
  return names


@pytest.mark.parametrize(
  'pass_name', ['forward', 'forward_backward', 'backward']
)
def test_calls_are_queued_and_waited_for(monkeypatch, pass_name):
  calls = []
  for name, module in _modules(calls).items():
    monkeypatch.setitem(sys.modules, name, module)
  x = jnp.ones((1, 4, 1, 2), jnp.bfloat16)
  arguments = {'q': x, 'k': x, 'v': x, 'beta': x[..., 0]}
  run, reason = fla_peer.prepare(CASE, pass_name, arguments)
  assert reason is None
  calls.clear()
  run(3)
  assert calls.count('wait') == 1 and calls[-1] == 'wait'
  assert calls.count('grad') == (0 if pass_name == 'forward' else 3)
  tensor = ((1, 4, 1, 2), 'bf16', 'cuda', pass_name != 'forward')
  forward = [call for call in calls if isinstance(call, tuple)]
  if pass_name == 'backward':
    assert not forward
  else:
    assert len(forward) == 3 and forward[0][:3] == (tensor,) * 3


def test_without_a_gpu_there_is_a_reason(monkeypatch):
  for name, module in _modules([], available=False).items():
    monkeypatch.setitem(sys.modules, name, module)
  run, reason = fla_peer.prepare(CASE, 'forward', {})
  assert run is None and reason.startswith('PyTorch sees no GPU')


def test_without_the_packages_there_is_a_reason(monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  run, reason = fla_peer.prepare(CASE, 'forward', {})
  assert run is None and 'pip install torch' in reason


def test_too_little_memory_is_a_reason(monkeypatch):
  modules = _modules([], error=MemoryError('none left\nframes'))
  for name, module in modules.items():
    monkeypatch.setitem(sys.modules, name, module)
  arguments = dict.fromkeys(('q', 'k', 'v', 'beta'), jnp.ones(2))
  run, reason = fla_peer.prepare(CASE, 'forward', arguments)
  assert (run, reason) == (None, 'MemoryError: none left')


def test_a_refusal_of_the_peer_is_a_reason(monkeypatch):
  modules = _modules([], error=RuntimeError('use Triton 3.8\non Hopper'))
  for name, module in modules.items():
    monkeypatch.setitem(sys.modules, name, module)
  arguments = dict.fromkeys(('q', 'k', 'v', 'beta'), jnp.ones(2))
  run, reason = fla_peer.prepare(CASE, 'backward', arguments)
  assert (run, reason) == (None, 'RuntimeError: use Triton 3.8')
