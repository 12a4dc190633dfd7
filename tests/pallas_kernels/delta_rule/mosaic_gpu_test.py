from collections.abc import Callable
import dataclasses
import functools
import json
import re
import types

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import delta_rule
from pallas_kernels import normalization
from pallas_kernels.delta_rule import arg_specs
from pallas_kernels.delta_rule import mosaic_gpu
from pallas_kernels.delta_rule import mosaic_gpu_chunk_bwd
from pallas_kernels.delta_rule import mosaic_gpu_config
from pallas_kernels.delta_rule import mosaic_gpu_helpers
from pallas_kernels.delta_rule import mosaic_gpu_layout as layout
from pallas_kernels.delta_rule import mosaic_gpu_scan
from tests import mosaic_gpu_interpreter
from tests import testing

# By whether states are kept, and whether half of the GPU would be idle.
KERNELS = {
  (True, False): (
    'inverse',
    'recurrence_saving',
    'recurrence_bwd',
    'chunk_bwd',
  ),
  (False, False): (
    'inverse',
    'recurrence',
    'states',
    'recurrence_bwd',
    'chunk_bwd',
  ),
  (True, True): ('chunk_fwd_recurrence_saving', 'recurrence_chunk_bwd'),
  (False, True): ('chunk_fwd_recurrence', 'states', 'recurrence_chunk_bwd'),
}


def _arguments(T=64, H=1, HV=1, K=64, V=64, dtype='bfloat16'):  # noqa: N803
  spec = arg_specs.ArgSpec(
    name='one', B=1, T=T, H=H, HV=HV, K=K, V=V, dtype=dtype
  )
  state = jnp.ones((1, HV, K, V), jnp.float32)
  return {**arg_specs.random_arguments(spec), 'initial_state': state}


def _error(actual, expected):
  return testing.error(np.float64(actual), np.float64(expected))


def _loss(arguments, config=None, **options):
  o, state = mosaic_gpu.delta_rule(
    **arguments, scale=0.1, config=config, **options
  )
  return jnp.sum(o.astype(jnp.float32)) + jnp.sum(state)


def _interpreted(detect_races=False, processors=1, **options):
  interpret = mosaic_gpu_interpreter.parameters(detect_races=detect_races)
  return mosaic_gpu_config.Config(
    interpret=interpret, processors=processors, **options
  )


@pytest.mark.parametrize(
  ('changed', 'reason'),
  [
    ({'dtype': 'float32'}, "bfloat16, got float32; use implementation='xla'"),
    ({'K': 256}, 'K must be 64 or 128, got 256'),
    ({'V': 32}, 'V must be 64 or 128, got 32'),
  ],
)
def test_refuses_what_it_does_not_cover(changed, reason):
  with pytest.raises(NotImplementedError, match=reason):
    mosaic_gpu.delta_rule(**_arguments(**changed), scale=1.0)


def test_refuses_decays_per_channel_and_other_chunks():
  arguments = _arguments()
  g = jnp.zeros(arguments['q'].shape, jnp.float32)
  with pytest.raises(NotImplementedError, match='no decay per channel'):
    mosaic_gpu.delta_rule(**arguments, g=g, scale=1.0)
  with pytest.raises(NotImplementedError, match='chunk_size is 64, got 32'):
    mosaic_gpu.delta_rule(**arguments, scale=1.0, chunk_size=32)


def test_says_why_it_cannot_run_here():
  with pytest.raises(NotImplementedError, match='it needs a Hopper GPU'):
    delta_rule(**_arguments(), implementation='mosaic_gpu')


@pytest.mark.parametrize(('kept', 'idle'), KERNELS)
@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize(('width', 'length'), [(64, 101), (128, 200)])
def test_lowers_for_cuda(width, length, gated, kept, idle):
  arguments = _arguments(T=length, HV=2, K=width, V=width)
  if gated:
    arguments['g'] = jnp.zeros(arguments['beta'].shape, jnp.float32)
  config = mosaic_gpu_config.Config(
    save_states=kept, processors=50 if idle else 2 * width // 64
  )
  run = jax.jit(jax.value_and_grad(_loss), static_argnums=1)
  lowered = run.trace(arguments, config).lower(lowering_platforms=('cuda',))
  text = lowered.as_text()
  called = set(re.findall(r'delta_rule_(\w+?)_mosaic_gpu', text))
  assert called == set(KERNELS[kept, idle])


# A row counts once for all devices; every device has the same shared memory.
@pytest.mark.parametrize(
  'row',
  sorted(
    {
      tuple(row[name] for name in ('K', 'V', *mosaic_gpu_config.TUNED))
      for row in json.loads(mosaic_gpu_config.TABLE.read_text())
    }
  ),
)
@pytest.mark.parametrize('processors', [132, 2, 1])
def test_every_row_of_the_table_fits_the_shared_memory(row, processors):
  key_dim, value_dim, *tuned = row
  named = zip(mosaic_gpu_config.TUNED, tuned, strict=True)
  config = mosaic_gpu_config.Config(processors=processors, **dict(named))
  arguments = _arguments(T=256, K=key_dim, V=value_dim)
  arguments['g'] = jnp.zeros(arguments['beta'].shape, jnp.float32)
  loss = functools.partial(_loss, config=config, normalize_qk=True)
  traced = jax.jit(jax.grad(loss)).trace(arguments)
  assert traced.lower(lowering_platforms=('cuda',)).as_text()


def test_lowers_beyond_2_to_31_elements():
  spec = arg_specs.ArgSpec(
    name='large', B=2, T=2**17, H=66, HV=66, K=128, V=128, dtype='bfloat16'
  )
  state = jax.ShapeDtypeStruct((2, 66, 128, 128), jnp.float32)
  arguments = {**spec.arguments(), 'initial_state': state}
  traced = jax.jit(jax.grad(_loss)).trace(arguments)
  assert traced.lower(lowering_platforms=('cuda',)).as_text()


def test_refuses_second_derivatives():
  arguments, config = _arguments(), _interpreted()

  def loss(v):
    found = jax.grad(_loss)(arguments | {'v': v}, config)
    return jnp.sum(found['q'].astype(jnp.float32))

  with pytest.raises(NotImplementedError, match="use implementation='recurr"):
    jax.grad(loss)(arguments['v'])


@pytest.mark.parametrize('normalize_qk', [True, False])
@pytest.mark.parametrize('save', [True, False])
def test_residuals_are_named(save, normalize_qk):
  config = mosaic_gpu_config.Config(save_inverse=save, save_states=save)
  loss = functools.partial(_loss, config=config, normalize_qk=normalize_qk)
  text = str(jax.make_jaxpr(jax.grad(loss))(_arguments()))
  found = set(re.findall(r'name\[name=delta_rule_(\w+)', text))
  names = {'q', 'k', 'v', 'beta', 'initial_state'}
  names |= {'chunk_inverse', 'states'} if save else set()
  assert found == names | ({'norms'} if normalize_qk else set())


_MOVES = ('reshape', 'slice', 'name')


def _computed_outside(jaxpr):
  """Yields what is computed outside of kernels."""
  for equation in jaxpr.eqns:
    inner = [
      getattr(value, 'jaxpr', value)
      for value in equation.params.values()
      if hasattr(value, 'eqns') or hasattr(value, 'jaxpr')
    ]
    if equation.primitive.name == 'mpmd_map':  # A kernel.
      continue
    for part in inner:
      yield from _computed_outside(part)
    if not inner and equation.primitive.name not in _MOVES:
      yield from (variable.aval for variable in equation.outvars)


@pytest.mark.parametrize('normalized', [False, True])
def test_normalizes_within_the_kernels(normalized):
  arguments = _arguments(T=256, K=128, V=128)

  def run(arguments):
    q, k = arguments['q'], arguments['k']
    if normalized:
      q, k = normalization.l2_normalize(q), normalization.l2_normalize(k)
    arguments = arguments | {'q': q, 'k': k}
    return mosaic_gpu.delta_rule(**arguments, scale=1.0, normalize_qk=True)

  jaxpr = jax.make_jaxpr(run)(arguments).jaxpr
  sizes = {aval.size for aval in _computed_outside(jaxpr)}
  assert (max(sizes) >= arguments['q'].size) == normalized


def test_states_kept_give_the_same_bits():
  arguments = _arguments(T=130)
  found = [
    jax.jit(jax.grad(functools.partial(_loss, config=config)))(arguments)
    for config in (_interpreted(), _interpreted(save_states=False))
  ]
  assert all(bool(jnp.array_equal(found[0][n], found[1][n])) for n in arguments)


@pytest.mark.parametrize(
  ('gated', 'normalize_qk'), [(False, False), (True, True)]
)
def test_blocks_for_whole_rows_give_the_same_bits(gated, normalize_qk):
  arguments = _arguments(T=70, V=128)
  if gated:
    arguments['g'] = -arguments['beta'].astype(jnp.float32)
  found = [
    jax.jit(
      jax.grad(
        functools.partial(
          _loss,
          config=_interpreted(processors=processors),
          normalize_qk=normalize_qk,
        )
      )
    )(arguments)
    for processors in (2, 1)
  ]
  assert all(bool(jnp.array_equal(found[0][n], found[1][n])) for n in arguments)


@pytest.mark.parametrize(
  ('gated', 'normalize_qk', 'processors', 'save_states'),
  [(False, False, 4, True), (False, True, 5, False), (True, False, 50, True)],
)
def test_helpers_change_only_how_outputs_are_rounded(
  gated, normalize_qk, processors, save_states
):
  arguments = _arguments(T=200, V=128)
  if gated:
    arguments['g'] = -arguments['beta'].astype(jnp.float32)

  def run(processors):
    config = _interpreted(processors=processors, save_states=save_states)
    rule = functools.partial(
      mosaic_gpu.delta_rule,
      scale=0.1,
      normalize_qk=normalize_qk,
      config=config,
    )

    @jax.jit
    def compute(arguments):
      (o, state), pullback = jax.vjp(lambda x: rule(**x), arguments)
      return o, (state, pullback((jnp.ones_like(o), state))[0])

    return compute(arguments)

  (o, others), (other_o, same_others) = run(2), run(processors)
  same = jax.tree.map(jnp.array_equal, others, same_others)
  assert all(jax.tree.leaves(same))
  assert 0 < _error(other_o, o) < 0.005


@pytest.mark.parametrize(
  ('rows', 'width', 'blocks'),
  [(16, 128, 100), (33, 128, 66), (34, 128, 0), (66, 64, 66), (67, 64, 0)],
)
def test_helpers_if_half_of_the_processors_have_no_row(rows, width, blocks):
  sizes = layout.Sizes(
    B=1, T=64, H=rows, HV=rows, K=64, V=width, gated=False, scale=1.0
  )
  config = mosaic_gpu_config.Config(processors=132)
  assert mosaic_gpu_config.helper_blocks(sizes, config) == blocks


@pytest.mark.parametrize(
  ('rows', 'width', 'groups'),
  [(66, 128, 1), (67, 128, 2), (133, 64, 1), (67, 192, 1), (34, 256, 2)],
)
def test_whole_rows_if_blocks_are_more_than_processors(rows, width, groups):
  sizes = layout.Sizes(
    B=1, T=64, H=rows, HV=rows, K=64, V=width, gated=False, scale=1.0
  )
  config = mosaic_gpu_config.Config(processors=132)
  assert mosaic_gpu_config.state_groups(sizes, config) == groups


def test_states_are_kept_only_for_gradients():
  config = mosaic_gpu_config.Config(processors=1)
  loss = functools.partial(_loss, config=config)
  saving = 'delta_rule_recurrence_saving'
  assert saving not in str(jax.make_jaxpr(loss)(_arguments()))
  text = str(jax.make_jaxpr(jax.grad(loss))(_arguments()))
  assert saving in text
  assert 'delta_rule_states"' not in text


def test_same_bits_in_every_run():
  run = jax.jit(jax.grad(functools.partial(_loss, config=_interpreted())))
  arguments = _arguments(T=70)
  first, second = run(arguments), run(arguments)
  assert all(bool(jnp.array_equal(first[n], second[n])) for n in first)


def test_vmap_is_a_loop():
  run = functools.partial(
    mosaic_gpu.delta_rule, scale=0.1, config=_interpreted()
  )
  first = _arguments()
  second = jax.tree.map(lambda x: x * jnp.asarray(0.5, x.dtype), first)
  both = jax.tree.map(lambda *x: jnp.stack(x), first, second)
  o, state = jax.jit(jax.vmap(lambda x: run(**x)))(both)
  for n, arguments in enumerate((first, second)):
    expected = jax.jit(lambda x: run(**x))(arguments)
    assert jnp.array_equal(o[n], expected[0])
    assert jnp.array_equal(state[n], expected[1])


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['entering', 'behind'],
  meta_fields=['told'],
)
@dataclasses.dataclass(frozen=True)
class _Others:
  """Stands for `sequence_parallel.Exchange`: other devices that are not there.

  The interpreter takes one device at a time.
  """

  entering: jax.Array
  behind: jax.Array
  told: Callable[..., None]  # of what they are told, by name

  def enter(self, affine):
    jax.debug.callback(self.told, affine=affine)
    return self.entering, affine[..., self.entering.shape[-1] :]

  def leave(self, own, transition):
    jax.debug.callback(self.told, own=own, transition=transition)
    return self.behind


@pytest.mark.parametrize(
  ('gated', 'normalize_qk', 'key_dim', 'processors', 'save_states'),
  [
    (False, False, 64, 2, True),
    (False, True, 128, 1, True),
    (True, True, 64, 6, False),
    (True, False, 64, 1, True),
    ('segments', False, 64, 2, True),
  ],
)
def test_shares_a_row(gated, normalize_qk, key_dim, processors, save_states):
  arguments = _arguments(T=130, K=key_dim, V=128)
  ids = None
  if gated == 'segments':  # A reset within the part: M is 0.
    ids = jnp.where(jnp.arange(130) < 70, 1, 2).astype(jnp.int32)[None]
  elif gated:
    arguments['g'] = -0.01 * arguments['beta'].astype(jnp.float32)
  shape = arguments['initial_state'].shape
  keys = jax.random.split(jax.random.key(0), 5)
  first, entering, dlast, behind = (
    jax.random.normal(key, shape) for key in keys[:4]
  )
  do = jax.random.normal(keys[4], arguments['v'].shape, jnp.bfloat16)
  run = functools.partial(
    mosaic_gpu.delta_rule,
    scale=0.1,
    segment_ids=ids,
    normalize_qk=normalize_qk,
    config=_interpreted(processors=processors, save_states=save_states),
  )

  @jax.jit
  def compute(first, dlast, exchange):
    results, pullback = jax.vjp(
      lambda x: run(**x, exchange=exchange),
      arguments | {'initial_state': first},
    )
    return results, pullback((do, dlast))[0]

  told = {}
  others = _Others(entering, behind, lambda **named: told.update(named))
  (o, *found), gradients = compute(first, dlast, others)
  (whole_o, *whole), expected = compute(first + entering, dlast + behind, None)
  same = jax.tree.map(jnp.array_equal, (found, gradients), (whole, expected))
  assert all(jax.tree.leaves(same))
  # A whole row has helpers if there are processors, and rounds once more.
  assert _error(o, whole_o) <= (0.005 if processors > 2 else 0)

  (_, state), gradients = compute(first, dlast, None)
  jax.effects_barrier()
  value_dim = shape[-1]
  transition = told['affine'][..., value_dim:]
  assert jnp.array_equal(told['transition'], transition)
  assert bool(jnp.any(transition != 0)) == (ids is None)
  # Of other kernels: the interpreter's compiler may round them otherwise.
  expected = {'affine': state, 'own': gradients['initial_state']}
  for name, value in expected.items():
    assert _error(told[name][..., :value_dim], value) < 1e-5
  assert _error(state + transition @ entering, whole[0]) < 0.005


def _has_race(arguments, processors=1, **options) -> bool:
  try:
    config = _interpreted(detect_races=True, processors=processors)
    run = jax.grad(functools.partial(_loss, config=config, **options))
    jax.block_until_ready(jax.jit(run)(arguments))
    return mosaic_gpu_interpreter.races_found()
  except jax.errors.JaxRuntimeError as error:
    return 'race' in str(error).lower()
  finally:
    mosaic_gpu_interpreter.reset()


def test_finds_no_race():
  assert not _has_race(_arguments(T=130))


def test_finds_no_race_in_what_shares_a_row():
  arguments = _arguments(T=130)
  state = arguments['initial_state']
  exchange = _Others(state, state, lambda **_: None)
  assert not _has_race(arguments, exchange=exchange)


def _have_helpers_race(monkeypatch, value_dim, gated=False) -> bool:
  """Returns whether helpers do alone: the interpreter has no semaphores."""
  monkeypatch.setattr(mosaic_gpu_scan, '_take_row', lambda *args: None)
  # Three turns of both workers of a block.
  arguments = _arguments(T=330, V=value_dim)
  if gated:
    arguments['g'] = jnp.full((1, 330, 1), -0.1)
  processors = 1 + 2 * value_dim // 64
  return _has_race(arguments, processors=processors, normalize_qk=True)


@pytest.mark.parametrize('value_dim', [64, 128])
@pytest.mark.parametrize('gated', [False, True])
def test_finds_no_race_in_helpers(monkeypatch, value_dim, gated):
  assert not _have_helpers_race(monkeypatch, value_dim, gated)


@pytest.mark.parametrize(
  ('module', 'name'),
  [
    (mosaic_gpu_helpers, 'barrier_wait'),
    (mosaic_gpu_chunk_bwd, 'barrier_wait'),
    (mosaic_gpu_chunk_bwd, 'commit_smem'),
    (mosaic_gpu_chunk_bwd, 'wait_smem_to_gmem'),
  ],
)
def test_finds_helpers_that_do_not_wait(monkeypatch, module, name):
  careless = vars(plgpu) | {name: lambda *args, **kwargs: None}
  careless = types.SimpleNamespace(**careless)
  monkeypatch.setattr(module, 'plgpu', careless)
  assert _have_helpers_race(monkeypatch, value_dim=128)


@pytest.mark.parametrize('name', ['commit_smem', 'wait_smem_to_gmem'])
def test_finds_planted_races(monkeypatch, name):
  monkeypatch.setattr(plgpu, name, lambda *args, **kwargs: None)
  assert _has_race(_arguments(T=130))
