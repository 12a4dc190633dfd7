"""Float64 oracles, inputs and the numerics gate of the kernel tests."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import delta_rule
from pallas_kernels.delta_rule import arg_specs

DIFFERENTIABLE = ('q', 'k', 'v', 'beta', 'initial_state')

# Greatest rms(difference) / rms(reference).
_LIMIT_FLOAT32 = 1e-5
_LIMITS_16_BIT = {
  'o': 0.005,
  'final_state': 0.005,
  'dq': 0.008,
  'dk': 0.008,
  'dv': 0.008,
  'dinitial_state': 0.008,
  'dbeta': 0.02,
  'dg': 0.02,
  'dbonus': 0.02,
}

# name: (cosine between keys or None, greatest beta, beta near its greatest)
KINDS = {
  'random': (None, 1.0, False),
  'random_beta_2': (None, 1.99, True),
  'cos_0.9_beta_1': (0.9, 1.0, True),
  'cos_0.9_beta_2': (0.9, 1.99, True),
  'cos_0.99_beta_1': (0.99, 1.0, True),
  'cos_0.99_beta_2': (0.99, 1.99, True),
  'cos_1_beta_1': (1.0, 1.0, True),
  'cos_1_beta_2': (1.0, 1.99, True),
}


# name: what the log-decays are; `mixed` has 0, -20, -1e-3 and others side by
# side.
DECAYS = ('random', 'zero', 'closed', 'mixed')
GATES = (None, *(f'{axes}_{d}' for axes in ('head', 'channel') for d in DECAYS))


class Problem(NamedTuple):
  """Numpy float64 arguments, rounded to the dtype of the call."""

  arguments: dict[str, np.ndarray]  # q k v beta (g) initial_state
  segment_ids: np.ndarray | None
  cotangents: tuple[np.ndarray, np.ndarray]  # of o and final_state
  dtype: str
  normalize_qk: bool = False

  @property
  def results(self) -> tuple[str, ...]:
    """Names of the values and of every gradient."""
    return ('o', 'final_state', *(f'd{name}' for name in self.arguments))


def _runs(length: int, runs) -> np.ndarray:
  """Repeats (id, count) pairs up to `length`; the last one fills up."""
  row = np.concatenate([np.full(count, i, np.int32) for i, count in runs])
  return np.pad(row, (0, max(0, length - len(row))), mode='edge')[:length]


def segments(name: str, batch: int, length: int) -> np.ndarray | None:
  """Returns segment ids [B, T] by name; the rows differ from one another."""
  if name == 'none':
    return None
  position = np.arange(length)
  lengths = np.random.default_rng(3).integers(1, 40, length)
  inside = [(5, 11), (0, 9), (5, 7), (0, 30), (9, 3), (0, 1), (4, 1)]
  rows = {
    'length_1': [position + 1, position % 2 + 1],
    'mixed': [
      _runs(length, list(enumerate(lengths, start=1))),
      np.full(length, 7),
    ],
    'padding_inside': [_runs(length, inside), _runs(length, inside[::-1])],
    'padding_ends': [
      np.where((position < 5) | (position >= length - 40), 0, 2),
      np.where(position < length // 2, 0, 1 + position // 13),
    ],
    'padding_rows': [np.zeros(length), position // 20 + 1],
  }[name]
  rows = [rows[b % len(rows)] for b in range(batch)]
  return np.stack(rows).astype(np.int32)


SEGMENTS = (
  'length_1',
  'mixed',
  'padding_inside',
  'padding_ends',
  'padding_rows',
)


def keys_with_cosine(rng, shape, cosine) -> np.ndarray:
  """Returns unit keys [B, T, H, K]; any two of a head have about a cosine."""
  noise = rng.standard_normal(shape)
  noise /= np.linalg.norm(noise, axis=-1, keepdims=True)
  if cosine is None:
    return noise
  common = rng.standard_normal((shape[0], 1, *shape[2:]))
  common /= np.linalg.norm(common, axis=-1, keepdims=True)
  keys = np.sqrt(cosine) * common + np.sqrt(1 - cosine) * noise
  return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


def decays(rng, shape, name: str) -> np.ndarray:
  """Returns log-decays of a shape [B, T, ...] by name (see DECAYS)."""
  g = -np.exp(rng.standard_normal(shape) - 2)
  if name == 'mixed':
    kinds = rng.integers(0, 4, shape)
    g = np.choose(kinds, [g, np.zeros(shape), np.full(shape, -20.0), 1e-2 * g])
  return {'zero': np.zeros(shape), 'closed': np.full(shape, -20.0)}.get(name, g)


def make_problem(
  spec: arg_specs.ArgSpec,
  kind='random',
  segment_name='none',
  seed=0,
  gate: str | None = None,
  normalize_qk: bool = False,
) -> Problem:
  """Returns inputs of a kind, with a state to start from and cotangents.

  If q and k are to be normalised, their norms are spread over two decades.
  """
  cosine, most, near = KINDS[kind]
  rng = np.random.default_rng(seed)
  shapes = {name: a.shape for name, a in spec.arguments().items()}
  shapes['initial_state'] = (spec.B, spec.HV, spec.K, spec.V)
  arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
  arrays['k'] = keys_with_cosine(rng, shapes['k'], cosine)
  arrays['beta'] = most / (1 + np.exp(-arrays['beta'] - (4 if near else 0)))
  cotangents = (
    rng.standard_normal(shapes['v']),
    rng.standard_normal(shapes['initial_state']),
  )
  if normalize_qk:
    for name in ('q', 'k'):
      norms = 10 ** rng.uniform(-1, 1, (*shapes[name][:3], 1))
      arrays[name] = arrays[name] * norms
  if gate is not None:
    axes, name = gate.split('_')
    shape = (*shapes['beta'], *((spec.K,) if axes == 'channel' else ()))
    state = arrays.pop('initial_state')
    arrays |= {'g': decays(rng, shape, name), 'initial_state': state}
  arrays = {n: _round(a, _dtype_of(n, spec.dtype)) for n, a in arrays.items()}
  rounded = (
    _round(cotangents[0], spec.dtype),
    _round(cotangents[1], 'float32'),
  )
  ids = segments(segment_name, spec.B, spec.T)
  return Problem(arrays, ids, rounded, spec.dtype, normalize_qk)


def _dtype_of(name: str, dtype: str):
  # A log-decay in 16 bits would be another decay: gates stay in float32.
  is_wide = name in ('initial_state', 'g') and dtype != 'float64'
  return 'float32' if is_wide else dtype


def _round(array, dtype) -> np.ndarray:
  return np.asarray(array).astype(jnp.dtype(dtype)).astype(np.float64)


def token_recurrence(
  arguments, *, scale=None, segment_ids=None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns o and the final state, token by token in numpy float64.

  Written from the equation alone, with none of the package's code.
  """
  q, k, v, beta, first = (arguments[n] for n in DIFFERENTIABLE)
  g = arguments.get('g')
  batch, length, heads, key_dim = q.shape
  scale = key_dim**-0.5 if scale is None else scale
  o, final = np.zeros(v.shape), first.copy()
  for b, h in np.ndindex(batch, v.shape[2]):
    state, last, kh = first[b, h].copy(), None, h // (v.shape[2] // heads)
    for t in range(length):
      segment = 1 if segment_ids is None else segment_ids[b, t]
      if segment == 0:
        continue
      if last is not None and last != segment:
        state[:] = 0
      last = segment
      if g is not None:
        state *= np.exp(g[b, t, h]).reshape(-1, 1)
      error = v[b, t, h] - k[b, t, kh] @ state
      state += beta[b, t, h] * np.outer(k[b, t, kh], error)
      o[b, t, h] = scale * (q[b, t, kh] @ state)
    final[b, h] = state
  return o, final


def as_arrays(problem: Problem, dtype: str) -> list[jax.Array]:
  """Returns q, k, v, beta, (g,) initial_state in the dtype of a call."""
  return [
    jnp.asarray(a, jnp.dtype(_dtype_of(name, dtype)))
    for name, a in problem.arguments.items()
  ]


@functools.lru_cache(maxsize=256)
def _values_and_gradients(
  implementation: str, chunk_size: int | None, normalize_qk: bool
):
  """Returns the jitted (arguments, ids, cotangents) -> results of an op."""

  def compute(arguments, segment_ids, cotangents):
    def run(arguments):
      return delta_rule(
        **arguments,
        segment_ids=segment_ids,
        normalize_qk=normalize_qk,
        chunk_size=chunk_size,
        implementation=implementation,
      )

    (o, final_state), pullback = jax.vjp(run, arguments)
    (gradients,) = pullback(cotangents)
    gradients = {f'd{name}': d for name, d in gradients.items()}
    return {'o': o, 'final_state': final_state, **gradients}

  return jax.jit(compute)


def evaluate(
  problem: Problem, implementation: str, dtype=None, chunk_size=None
) -> dict[str, np.ndarray]:
  """Returns o, final_state and every gradient by name, in float64."""
  dtype = dtype or problem.dtype
  ids = problem.segment_ids
  cotangents = tuple(
    jnp.asarray(c, jnp.dtype(_dtype_of(name, dtype)))
    for name, c in zip(('o', 'initial_state'), problem.cotangents, strict=True)
  )
  compute = _values_and_gradients(
    implementation, chunk_size, problem.normalize_qk
  )
  results = compute(
    dict(zip(problem.arguments, as_arrays(problem, dtype), strict=True)),
    None if ids is None else jnp.asarray(ids),
    cotangents,
  )
  return {
    name: np.asarray(results[name]).astype(np.float64)
    for name in problem.results
  }


def oracle(problem: Problem) -> dict[str, np.ndarray]:
  """Returns values of `token_recurrence` and float64 gradients."""
  with jax.enable_x64(True):
    results = evaluate(problem, 'recurrent', 'float64')
  arguments = dict(problem.arguments)
  for name in ('q', 'k') if problem.normalize_qk else ():
    squares = np.sum(arguments[name] ** 2, axis=-1, keepdims=True)
    arguments[name] = arguments[name] / np.sqrt(squares + 1e-6)
  o, state = token_recurrence(arguments, segment_ids=problem.segment_ids)
  return results | {'o': o, 'final_state': state}


def error(actual, expected) -> float:
  """Returns rms(actual - expected) / rms(expected); 0 where both are 0.

  It is infinite where that is no number: no limit may let it pass.
  """
  difference = np.sqrt(np.mean((actual - expected) ** 2))
  if np.isnan(difference):
    return np.inf
  return float(difference and difference / np.sqrt(np.mean(expected**2)))


@functools.lru_cache(maxsize=256)
def reference_results(spec, kind, segment_name, gate=None, normalize_qk=False):
  """Returns (problem, float64 oracle, results of `recurrent`), cached."""
  problem = make_problem(
    spec, kind, segment_name, gate=gate, normalize_qk=normalize_qk
  )
  return problem, oracle(problem), evaluate(problem, 'recurrent')


def limits(problem, expected, reference) -> dict[str, float]:
  """Returns the greatest error allowed, by result.

  It is twice the error of the same-dtype reference plus 2 ulp, and at most the
  absolute limit of the dtype.
  """
  ulp = float(jnp.finfo(jnp.dtype(problem.dtype)).eps)
  is_float32 = problem.dtype == 'float32'
  absolute = {
    name: _LIMIT_FLOAT32 if is_float32 else _LIMITS_16_BIT[name]
    for name in problem.results
  }
  return {
    name: min(
      2 * error(reference[name], expected[name]) + 2 * ulp, absolute[name]
    )
    for name in problem.results
  }
