"""Holds the Hopper kernels, interpreted, to the definition of the op."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.delta_rule import arg_specs
from pallas_kernels.delta_rule import mosaic_gpu
from pallas_kernels.delta_rule import mosaic_gpu_config
from tests import mosaic_gpu_interpreter
from tests import testing


def _spec(**sizes):
  sizes = {'B': 1, 'T': 100, 'H': 1, 'HV': 1, 'K': 64, 'V': 64} | sizes
  return arg_specs.ArgSpec(name='interpreted', dtype='bfloat16', **sizes)


def _evaluate(problem, config):
  """Returns values and gradients by name."""
  arguments = dict(
    zip(
      problem.arguments, testing.as_arrays(problem, problem.dtype), strict=True
    )
  )
  ids = problem.segment_ids
  run = functools.partial(
    mosaic_gpu.delta_rule,
    scale=arguments['q'].shape[-1] ** -0.5,
    segment_ids=None if ids is None else jnp.asarray(ids),
    normalize_qk=problem.normalize_qk,
    config=config,
  )

  @jax.jit
  def compute(arguments, cotangents):
    (o, state), pullback = jax.vjp(lambda x: run(**x), arguments)
    (gradients,) = pullback(cotangents)
    gradients = {f'd{name}': d for name, d in gradients.items()}
    return {'o': o, 'final_state': state, **gradients}

  do, dstate = problem.cotangents
  cotangents = jnp.asarray(do, jnp.bfloat16), jnp.asarray(dstate, jnp.float32)
  results = compute(arguments, cotangents)
  return {n: np.asarray(x).astype(np.float64) for n, x in results.items()}


def _check(
  spec,
  kind='random',
  segments='none',
  gate=None,
  normalize_qk=False,
  races=False,
  **options,
):
  found = testing.reference_results(spec, kind, segments, gate, normalize_qk)
  _hold(*found, races, **options)


def _hold(
  problem,
  expected,
  reference,
  races=False,
  processors=2,
  allowed=None,
  **options,
):
  batch, _, heads, width = problem.arguments['v'].shape
  config = mosaic_gpu_config.Config(
    interpret=mosaic_gpu_interpreter.parameters(detect_races=races),
    processors=processors or batch * heads * width // 64,
    **options,
  )
  actual = _evaluate(problem, config)
  allowed = testing.limits(problem, expected, reference) | (allowed or {})
  errors = {n: testing.error(actual[n], expected[n]) for n in problem.results}
  assert not {
    n: (errors[n], allowed[n]) for n in errors if errors[n] > allowed[n]
  }


@pytest.mark.parametrize('kind', testing.KINDS)
def test_keys_of_width_64(kind):
  _check(_spec(T=200), kind)


@pytest.mark.parametrize('normalize_qk', [False, True])
@pytest.mark.parametrize('gate', [None, 'head_mixed'])
def test_no_races_at_width_128(gate, normalize_qk):
  spec = _spec(T=200, K=128, V=128)
  _check(
    spec,
    'cos_0.99_beta_2',
    gate=gate,
    normalize_qk=normalize_qk,
    races=True,
  )
  assert not mosaic_gpu_interpreter.races_found()


@pytest.mark.parametrize(
  ('gate', 'normalize_qk', 'save_states'),
  [(None, False, False), ('head_mixed', True, True)],
)
def test_no_races_of_blocks_for_whole_rows(gate, normalize_qk, save_states):
  _check(
    _spec(T=200, K=128, V=128),
    'cos_0.9_beta_2',
    gate=gate,
    normalize_qk=normalize_qk,
    races=True,
    save_states=save_states,
    processors=1,
  )
  assert not mosaic_gpu_interpreter.races_found()


@pytest.mark.parametrize(
  ('gate', 'normalize_qk', 'segments'),
  [(None, True, 'none'), ('head_mixed', False, 'mixed')],
)
def test_others_work_beside_the_rows(gate, normalize_qk, segments):
  spec = _spec(T=200, HV=2, V=128)
  _check(spec, 'random', segments, gate, normalize_qk, processors=9)


@pytest.mark.parametrize('kind', ['cos_0.99_beta_2', 'cos_1_beta_2'])
@pytest.mark.parametrize(
  ('gate', 'normalize_qk', 'save_states'),
  [(None, False, False), (None, True, True), ('head_mixed', True, False)],
)
def test_outputs_of_hard_keys_found_ahead(
  kind, gate, normalize_qk, save_states
):
  spec = _spec(T=200, K=128)
  _check(
    spec,
    kind,
    gate=gate,
    normalize_qk=normalize_qk,
    save_states=save_states,
    processors=9,
    allowed={'o': 0.0035},  # A single bfloat16 P is worse than that.
  )


@pytest.mark.parametrize('kind', ['cos_0.9_beta_2', 'cos_1_beta_2'])
def test_normalized_keys_of_width_64(kind):
  _check(_spec(T=130), kind, normalize_qk=True)


@pytest.mark.parametrize('segments', ['none', 'mixed', 'padding_inside'])
def test_normalized_keys_of_grouped_values(segments):
  spec = _spec(B=2, T=75, H=1, HV=2)
  _check(spec, 'random', segments, 'head_random', normalize_qk=True)


def test_normalized_keys_and_unequal_widths():
  _check(_spec(T=70, K=128), normalize_qk=True, save_inverse=False)


def test_keys_of_norm_zero():
  problem = testing.make_problem(_spec(), normalize_qk=True)
  arguments = dict(problem.arguments)
  for name in ('q', 'k'):
    arguments[name] = arguments[name].copy()
    arguments[name][:, ::3] = 0
  problem = problem._replace(arguments=arguments)
  expected = testing.oracle(problem)
  _hold(problem, expected, testing.evaluate(problem, 'recurrent'))


@pytest.mark.parametrize('normalize_qk', [False, True])
@pytest.mark.parametrize('gate', [None, 'head_random'])
def test_beta_of_zero_has_a_gradient(gate, normalize_qk):
  problem = testing.make_problem(_spec(), gate=gate, normalize_qk=normalize_qk)
  beta = problem.arguments['beta'].copy()
  beta[:, ::3] = 0
  arguments = problem.arguments | {'beta': beta}
  problem = problem._replace(arguments=arguments)
  expected = testing.oracle(problem)
  assert np.all(expected['dbeta'][:, ::3] != 0)
  _hold(problem, expected, testing.evaluate(problem, 'recurrent'))


@pytest.mark.parametrize('gate', [f'head_{d}' for d in testing.DECAYS])
def test_decays(gate):
  _check(_spec(), 'random_beta_2', gate=gate)


@pytest.mark.parametrize(
  'kind', [kind for kind in testing.KINDS if kind != 'cos_1_beta_1']
)
def test_decays_of_hard_keys(kind):
  _check(_spec(T=200), kind, gate='head_mixed')


def _rms(x):
  return np.sqrt(np.mean(np.square(x)))


def _terms_of_decay_gradient(problem):
  """Returns (dg, the root of the sum of its terms' squares) by token.

  dg is the sum over S . dS, of the state S that a token finds when its decay is
  done, and of the gradient of that.
  """
  arguments = {n: x[0] for n, x in problem.arguments.items()}
  q, k, v, beta, g = (arguments[n][:, 0] for n in ('q', 'k', 'v', 'beta', 'g'))
  do, gradient = (x[0] for x in problem.cotangents)
  state, gradient, tokens = arguments['initial_state'][0], gradient[0], len(g)
  states, sums, terms = [], np.zeros(tokens), np.zeros(tokens)
  for t in range(tokens):
    state = np.exp(g[t]) * state
    states.append(state)
    state = state + beta[t] * np.outer(k[t], v[t] - k[t] @ state)
  for t in reversed(range(tokens)):
    gradient = gradient + q.shape[1] ** -0.5 * np.outer(q[t], do[t, 0])
    gradient = gradient - beta[t] * np.outer(k[t], k[t] @ gradient)
    products = gradient * states[t]
    sums[t], terms[t] = products.sum(), np.sqrt(np.square(products).sum())
    gradient = np.exp(g[t]) * gradient
  return sums, terms


def test_decays_of_what_is_erased():
  found = testing.reference_results(
    _spec(T=200), 'cos_1_beta_1', 'none', 'head_mixed'
  )
  problem, expected, _ = found
  dg = expected['dg'][0, :, 0]
  sums, terms = _terms_of_decay_gradient(problem)
  np.testing.assert_allclose(sums, dg, atol=1e-12)
  assert _rms(dg) < 0.05 * _rms(terms)  # They cancel.
  rounding = 2.0**-8  # Of bfloat16.
  _hold(*found, allowed={'dg': rounding * _rms(terms) / _rms(dg)})


@pytest.mark.parametrize('segments', testing.SEGMENTS)
def test_segments(segments):
  _check(_spec(B=2, T=75), 'random', segments)


# Not with segments of length 1, which leave one decay a row with a gradient:
# it is a sum over K V products that cancel, of which no rms can be taken.
@pytest.mark.parametrize('segments', ['mixed', 'padding_inside'])
def test_segments_and_decays(segments):
  _check(_spec(B=2, T=75), 'random', segments, 'head_mixed')


def test_grouped_values():
  _check(_spec(T=70, H=2, HV=4), gate='head_random')


@pytest.mark.parametrize(('key', 'value'), [(64, 128), (128, 64)])
def test_unequal_widths(key, value):
  _check(_spec(T=70, K=key, V=value), gate='head_random')


@pytest.mark.parametrize('length', [1, 64, 65])
def test_lengths(length):
  _check(_spec(T=length))


@pytest.mark.parametrize('gate', [None, 'head_random'])
def test_states_not_kept(gate):
  _check(
    _spec(T=200, K=128, V=128),
    gate=gate,
    normalize_qk=gate is None,
    races=True,
    save_states=False,
  )
  assert not mosaic_gpu_interpreter.races_found()


def test_one_stage_and_no_inverse_kept():
  _check(_spec(T=130), stages=1, save_inverse=False)
