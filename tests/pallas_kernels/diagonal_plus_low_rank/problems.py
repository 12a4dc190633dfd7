"""Float64 oracle and inputs of the tests of diagonal_plus_low_rank."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import diagonal_plus_low_rank
from pallas_kernels.diagonal_plus_low_rank import arg_specs
from tests import testing

DIFFERENTIABLE = ('q', 'k', 'v', 'a', 'b', 'initial_state')

# `rwkv7`: b of norm 1, a = -eta b with eta in (0, 1) per channel; `unrelated`:
# |b| = 1, |a| = 1/2; the others: the delta rule on keys of `testing.KINDS`.
KINDS = ('rwkv7', 'unrelated', *testing.KINDS)


def _transition(rng, kind, k):
  """Returns (k, a, b) of a kind from unit keys."""
  noise = rng.standard_normal(k.shape)
  if kind == 'rwkv7':
    return rng.standard_normal(k.shape), -k / (1 + np.exp(-noise)), k
  if kind == 'unrelated':
    norm = np.linalg.norm(noise, axis=-1, keepdims=True)
    return rng.standard_normal(k.shape), noise / (2 * norm), k
  _, most, near = testing.KINDS[kind]
  beta = most / (1 + np.exp(-noise[..., :1] - (4 if near else 0)))
  return beta * k, -beta * k, k


def make_problem(
  spec: arg_specs.ArgSpec,
  kind='rwkv7',
  segment_name='none',
  seed=0,
  gate: str | None = None,
) -> testing.Problem:
  """Returns inputs of a kind, with a state to start from and cotangents."""
  rng = np.random.default_rng(seed)
  keys = (spec.B, spec.T, spec.H, spec.K)
  values = (spec.B, spec.T, spec.HV, spec.V)
  states = (spec.B, spec.HV, spec.K, spec.V)
  cosine, *_ = testing.KINDS.get(kind, (None,))
  unit = testing.keys_with_cosine(rng, keys, cosine)
  k, a, b = _transition(rng, kind, unit)
  q, v = rng.standard_normal(keys), rng.standard_normal(values)
  arrays = {'q': q, 'k': k, 'v': v, 'a': a, 'b': b}
  if gate is not None:
    axes, name = gate.split('_')
    shape = (*values[:-1], *((spec.K,) if axes == 'channel' else ()))
    arrays['g'] = testing.decays(rng, shape, name)
  arrays['initial_state'] = rng.standard_normal(states)
  wide = ('g', 'initial_state')  # In float32 beside 16-bit arrays.
  arrays = {
    n: _round(x, 'float32' if n in wide else spec.dtype)
    for n, x in arrays.items()
  }
  cotangents = (
    _round(rng.standard_normal(values), spec.dtype),
    _round(rng.standard_normal(states), 'float32'),
  )
  ids = testing.segments(segment_name, spec.B, spec.T)
  return testing.Problem(arrays, ids, cotangents, spec.dtype)


def _round(array, dtype) -> np.ndarray:
  return np.asarray(array).astype(jnp.dtype(dtype)).astype(np.float64)


def token_recurrence(
  arguments, *, scale=None, segment_ids=None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns o and the final state, token by token in numpy float64.

  Written from the equation alone, with none of the package's code.
  """
  q, k, v, a, b, first = (arguments[n] for n in DIFFERENTIABLE)
  g = arguments.get('g')
  heads, key_dim = q.shape[2:]
  scale = key_dim**-0.5 if scale is None else scale
  o, final = np.zeros(v.shape), first.copy()
  for row, h in np.ndindex(v.shape[0], v.shape[2]):
    state, last, kh = first[row, h].copy(), None, h // (v.shape[2] // heads)
    for t in range(v.shape[1]):
      segment = 1 if segment_ids is None else segment_ids[row, t]
      if segment == 0:
        continue
      if last is not None and last != segment:
        state = np.zeros_like(state)
      last = segment
      decay = np.ones(key_dim) if g is None else np.exp(g[row, t, h])
      decay = np.broadcast_to(decay, key_dim)
      transition = np.diag(decay) + np.outer(a[row, t, kh], b[row, t, kh])
      state = transition @ state + np.outer(k[row, t, kh], v[row, t, h])
      o[row, t, h] = scale * (q[row, t, kh] @ state)
    final[row, h] = state
  return o, final


@functools.lru_cache(maxsize=256)
def _values_and_gradients(implementation: str, chunk_size: int | None):
  """Returns the jitted (arguments, ids, cotangents) -> results of the op."""

  def compute(arguments, segment_ids, cotangents):
    def run(arguments):
      return diagonal_plus_low_rank(
        **arguments,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
      )

    (o, final_state), pullback = jax.vjp(run, arguments)
    (gradients,) = pullback(cotangents)
    gradients = {f'd{name}': d for name, d in gradients.items()}
    return {'o': o, 'final_state': final_state, **gradients}

  return jax.jit(compute)


def evaluate(
  problem: testing.Problem, implementation: str, dtype=None, chunk_size=None
) -> dict[str, np.ndarray]:
  """Returns o, final_state and every gradient by name, in float64."""
  dtype = dtype or problem.dtype
  ids = problem.segment_ids
  arrays = testing.as_arrays(problem, dtype)
  do, dstate = problem.cotangents
  results = _values_and_gradients(implementation, chunk_size)(
    dict(zip(problem.arguments, arrays, strict=True)),
    None if ids is None else jnp.asarray(ids),
    (jnp.asarray(do, arrays[0].dtype), jnp.asarray(dstate, arrays[-1].dtype)),
  )
  return {
    name: np.asarray(results[name]).astype(np.float64)
    for name in problem.results
  }


def oracle(problem: testing.Problem) -> dict[str, np.ndarray]:
  """Returns values of `token_recurrence` and float64 gradients."""
  with jax.enable_x64(True):
    results = evaluate(problem, 'recurrent', 'float64')
  o, state = token_recurrence(
    problem.arguments, segment_ids=problem.segment_ids
  )
  return results | {'o': o, 'final_state': state}


@functools.lru_cache(maxsize=256)
def reference_results(spec, kind, segment_name, gate=None):
  """Returns (problem, float64 oracle, results of `recurrent`), cached."""
  problem = make_problem(spec, kind, segment_name, gate=gate)
  return problem, oracle(problem), evaluate(problem, 'recurrent')


def limit(dtype: str, name: str, expected, reference) -> float:
  """Returns `testing.limits` of one result; a and b count as keys."""
  name = {'da': 'dk', 'db': 'dk'}.get(name, name)
  one = types.SimpleNamespace(dtype=dtype, results=(name,))
  return testing.limits(one, {name: expected}, {name: reference})[name]
