"""Float64 oracle, inputs and the numerics gate of linear attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import linear_attention
from pallas_kernels.linear_attention import arg_specs
from tests import testing

_WIDE = ('g', 'bonus', 'initial_state')


def _dtype_of(name: str, dtype: str):
  is_wide = name in _WIDE and dtype != 'float64'
  return jnp.dtype('float32' if is_wide else dtype)


def _round(array, dtype) -> np.ndarray:
  return np.asarray(array).astype(dtype).astype(np.float64)


def make_problem(
  spec: arg_specs.ArgSpec, decay='random', segment_name='none', seed=0
) -> testing.Problem:
  """Returns inputs with decays of a kind and a state to start from."""
  rng = np.random.default_rng(seed)
  arrays = {
    name: rng.standard_normal(a.shape) for name, a in spec.arguments().items()
  }
  state_shape = (spec.B, spec.HV, spec.K, spec.V)
  if 'g' in arrays:
    arrays['g'] = testing.decays(rng, arrays['g'].shape, decay)
  arrays['initial_state'] = rng.standard_normal(state_shape)
  arrays = {n: _round(a, _dtype_of(n, spec.dtype)) for n, a in arrays.items()}
  cotangents = (
    _round(rng.standard_normal(arrays['v'].shape), spec.dtype),
    _round(rng.standard_normal(state_shape), 'float32'),
  )
  ids = testing.segments(segment_name, spec.B, spec.T)
  return testing.Problem(arrays, ids, cotangents, spec.dtype)


def token_recurrence(
  arguments, *, scale=None, segment_ids=None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns o and the final state, token by token in numpy float64.

  Written from the equation alone, with none of the package's code.
  """
  q, k, v = (arguments[n] for n in 'qkv')
  g, bonus = arguments.get('g', np.zeros(v.shape[:3])), arguments.get('bonus')
  g = np.broadcast_to(g, v.shape[:3]) if g.ndim == 1 else g
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  o, final = np.zeros(v.shape), arguments['initial_state'].copy()
  for b, h in np.ndindex(v.shape[0], v.shape[2]):
    state, last, kh = final[b, h], None, h // (v.shape[2] // q.shape[2])
    for t in range(q.shape[1]):
      segment = 1 if segment_ids is None else segment_ids[b, t]
      if segment == 0:
        continue
      if last is not None and last != segment:
        state[:] = 0
      last = segment
      query, key, value = q[b, t, kh], k[b, t, kh], v[b, t, h]
      if bonus is not None:
        read = state + np.outer(bonus[h] * key, value)
      state *= np.exp(g[b, t, h]).reshape(-1, 1)
      state += np.outer(key, value)
      o[b, t, h] = scale * (query @ (state if bonus is None else read))
  return o, final


def as_arrays(problem: testing.Problem, dtype: str) -> dict[str, jax.Array]:
  """Returns the arguments in the dtypes of a call."""
  return {
    name: jnp.asarray(a, _dtype_of(name, dtype))
    for name, a in problem.arguments.items()
  }


@functools.lru_cache(maxsize=256)
def _values_and_gradients(implementation: str, chunk_size: int | None):
  """Returns the jitted (arguments, ids, cotangents) -> results of the op."""

  def compute(arguments, segment_ids, cotangents):
    def run(arguments):
      return linear_attention(
        **arguments,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
      )

    values, pullback = jax.vjp(run, arguments)
    (gradients,) = pullback(cotangents)
    return *values, *(gradients[name] for name in arguments)

  return jax.jit(compute)


def evaluate(
  problem: testing.Problem, implementation: str, dtype=None, chunk_size=None
) -> dict[str, np.ndarray]:
  """Returns o, final_state and every gradient by name, in float64."""
  dtype = dtype or problem.dtype
  ids = problem.segment_ids
  cotangents = tuple(
    jnp.asarray(c, _dtype_of(name, dtype))
    for name, c in zip(('o', 'initial_state'), problem.cotangents, strict=True)
  )
  # jit orders the keys of a dict; `results` has the order of the arguments.
  arguments = as_arrays(problem, dtype)
  results = _values_and_gradients(implementation, chunk_size)(
    arguments, None if ids is None else jnp.asarray(ids), cotangents
  )
  names = ('o', 'final_state', *(f'd{name}' for name in sorted(arguments)))
  return {
    name: np.asarray(result).astype(np.float64)
    for name, result in zip(names, results, strict=True)
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
def _reference_results(spec, decay, segment_name):
  problem = make_problem(spec, decay, segment_name)
  return problem, oracle(problem), evaluate(problem, 'recurrent')


def check(implementation, spec, decay='random', segments='none', chunk=None):
  """Holds an implementation to the oracle within the limits."""
  problem, expected, reference = _reference_results(spec, decay, segments)
  actual = evaluate(problem, implementation, chunk_size=chunk)
  allowed = testing.limits(problem, expected, reference)
  errors = {n: testing.error(actual[n], expected[n]) for n in problem.results}
  broken = {n: (e, allowed[n]) for n, e in errors.items() if e > allowed[n]}
  assert not broken
