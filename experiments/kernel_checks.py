"""Holds the kernels of the delta rule to a float64 recurrence, before timing.

Values and gradients of an implementation are compared with a scan over tokens
in float64. The error of a result is rms(difference) / rms(expected); at most it
may be twice that of the same scan in the dtype of the call plus 2 ulp, and at
most an absolute limit, the smaller of the two. Two runs must agree in every
bit.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import benchmark_cases
import pallas_kernels

Row = dict[str, Any]

# Greatest errors in bfloat16, whatever the scan's are.
LIMITS = {
  'o': 0.005,
  'final_state': 0.005,
  'dq': 0.008,
  'dk': 0.008,
  'dv': 0.008,
  'dinitial_state': 0.008,
  'dbeta': 0.02,
  'dg': 0.02,
}

_WIDE = ('g', 'initial_state')  # float32 in a call in bfloat16.


class WrongResultError(RuntimeError):
  """An implementation computes something else, so its time means nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
  """What is checked.

  Attributes:
    case: sizes, gate and dtype.
    implementation: the one that is held to the recurrence.
    cosine: of any two keys of a head, about; 0 for random ones.
    with_segments: two documents and padding in every row.
    may_refuse: NotImplementedError is an answer too.
    parts: devices that share the time axis, a stretch of every row each.
  """

  case: benchmark_cases.Case
  implementation: str
  cosine: float = 0.0
  with_segments: bool = False
  may_refuse: bool = False
  parts: int = 1


def _inputs(check: Check) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
  """Returns float64 arguments, rounded as the call's, and segment ids."""
  case = check.case
  rng = np.random.default_rng(1)
  arguments = {
    name: np.asarray(x, np.float64) for name, x in case.arguments().items()
  }
  common = rng.standard_normal((case.B, 1, case.H, case.K))
  common /= np.linalg.norm(common, axis=-1, keepdims=True)
  k = np.sqrt(check.cosine) * common
  k = k + np.sqrt(1 - check.cosine) * arguments['k']
  arguments['k'] = k / np.linalg.norm(k, axis=-1, keepdims=True)
  if case.normalize_qk:
    for name in ('q', 'k'):
      norms = 10 ** rng.uniform(-1, 1, (*arguments[name].shape[:3], 1))
      arguments[name] = arguments[name] * norms
  state = (case.B, case.value_heads, case.K, case.V)
  arguments['initial_state'] = rng.standard_normal(state)
  segments = None
  if check.with_segments:
    position = np.arange(case.T)
    segments = 1 + (position >= case.T // 3).astype(np.int32)
    segments[-case.T // 8 :] = 0
    segments = np.tile(segments, (case.B, 1))
  return _cast(arguments, case.dtype, np.float64), segments


def _cast(arguments: Mapping[str, Any], dtype: str, then=None):
  """Returns arguments in the dtypes of a call, or rounded to these."""
  cast = {}
  for name, x in arguments.items():
    wide = name in _WIDE and dtype != 'float64'
    x = np.asarray(x).astype(jnp.dtype('float32' if wide else dtype))
    cast[name] = x if then is None else x.astype(then)
  return cast


@functools.partial(jax.jit, static_argnames=('normalize_qk', 'implementation'))
def _evaluate(arguments, segment_ids, cotangents, **options):
  run = functools.partial(
    pallas_kernels.delta_rule, segment_ids=segment_ids, **options
  )
  (o, state), pullback = jax.vjp(lambda a: run(**a), arguments)
  (gradients,) = pullback(cotangents)
  results = {f'd{name}': x for name, x in gradients.items()}
  return {'o': o, 'final_state': state} | results


def _mesh(parts: int):
  """Returns a context in which the op runs over stretches of rows."""
  if parts == 1:
    return contextlib.nullcontext()
  devices = jax.devices()
  if len(devices) < parts:
    raise ValueError(
      f'a check with {parts} parts needs as many devices, got {len(devices)}'
    )
  mesh = jax.make_mesh(
    (parts,),
    ('sequence',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices[:parts],
  )
  return jax.set_mesh(mesh)


def _results(arguments, segments, dtype: str, *, parts: int = 1, **options):
  """Returns values and gradients by name; cotangents are random."""
  rng = np.random.default_rng(2)
  shapes = {'v': arguments['v'].shape}
  shapes['initial_state'] = arguments['initial_state'].shape
  cotangents = {name: rng.standard_normal(s) for name, s in shapes.items()}
  cotangents = _cast(_cast(cotangents, 'bfloat16'), dtype)
  with _mesh(parts):
    results = _evaluate(
      _cast(arguments, dtype),
      segments,
      tuple(cotangents.values()),
      **options,
    )
  return jax.device_get(results)


def _errors(found, expected) -> dict[str, float]:
  errors = {}
  for name, y in expected.items():
    x, y = (np.asarray(a, np.float64) for a in (found[name], y))
    rms = np.sqrt(np.mean(y**2))
    errors[name] = float(np.sqrt(np.mean((x - y) ** 2)) / rms)
  return errors


def _is_identical(first, second) -> bool:
  return all(first[n].tobytes() == second[n].tobytes() for n in first)


def row(check: Check) -> Row:
  """Returns errors, their limits and `broken`, what is wrong in words.

  `refused` is why the implementation does not cover the call, or None.
  """
  arguments, segments = _inputs(check)
  dtype = check.case.dtype
  described = {
    'kind': 'kernel_check',
    'op': check.case.op,
    'variant': check.case.variant,
    'shape': check.case.shape,
    'implementation': check.implementation,
    'cosine': check.cosine,
    'with_segments': check.with_segments,
    'parts': check.parts,
  }
  results = functools.partial(
    _results, arguments, segments, normalize_qk=check.case.normalize_qk
  )
  try:
    first, second = (
      results(dtype, implementation=check.implementation, parts=check.parts)
      for _ in range(2)
    )
  except NotImplementedError as error:
    broken = [] if check.may_refuse else [f'it must cover this: {error}']
    return described | {'refused': str(error), 'errors': {}, 'broken': broken}
  with jax.enable_x64(True):
    expected = results('float64', implementation='recurrent')
  scan = _errors(results(dtype, implementation='recurrent'), expected)
  errors = _errors(first, expected)
  ulp = float(jnp.finfo(jnp.dtype(dtype)).eps)
  limits = {n: min(2 * scan[n] + 2 * ulp, LIMITS[n]) for n in errors}
  broken = [
    f'{name} must be within {limits[name]:.1e}, its error is {error:.1e}'
    for name, error in errors.items()
    if not error <= limits[name]  # And is no nan.
  ]
  identical = _is_identical(first, second)
  if not identical:
    broken.append('two runs must agree in every bit, they differ')
  return described | {
    'refused': None,
    'errors': errors,
    'limits': limits,
    'identical': identical,
    'broken': broken,
  }


def format_row(found: Row) -> str:
  """Returns a row as a line."""
  shape, parts = found['shape'], found.get('parts', 1)
  start = (
    f'{found["implementation"]} {shape["name"]} {found["variant"]}, cosine '
    f'{found["cosine"]}{", segments" if found["with_segments"] else ""}'
    f'{f", {parts} parts" if parts > 1 else ""}: '
  )
  if found.get('refused'):
    return start + ('; '.join(found['broken']) or found['refused'])
  worst = max(found['errors'], key=lambda n: found['errors'][n])
  verdict = '; '.join(found['broken']) or 'right, the same in two runs'
  return (
    f'{start}greatest error {found["errors"][worst]:.1e} ({worst}); {verdict}'
  )


def require_right(found: Row) -> None:
  """Raises WrongResultError if something of a row is broken."""
  if found['broken']:
    raise WrongResultError(f'nothing was timed: {format_row(found)}')
