"""The language model: structure, initial values, remat, the pure functions."""

import dataclasses
import functools
import itertools
import re

from flax import nnx
import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import block as block_lib
from deltanet_jax import config as config_lib
from deltanet_jax import language_model
from deltanet_jax.layers import attention
from deltanet_jax.layers import delta_net
from deltanet_jax.layers import norm

CONFIG = config_lib.ModelConfig(
  vocab_size=31,
  model_width=16,
  num_layers=4,
  mixers=('delta_net', 'delta_net'),
  num_heads=2,
  mlp_width=24,
  dtype='float32',
  # The quickest to compile; the layers' tests cover the others.
  delta_net=delta_net.DeltaNetConfig(implementation='recurrent'),
)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9)).astype(np.int32)
HYBRID = ('delta_net', 'delta_net', 'sliding_window', 'delta_net')
NORMAL, UNIFORM, ONES = 'normal', 'uniform', 'ones'
INITIAL = {
  'embedding.embedding': NORMAL,
  'blocks.block_0.mixer_norm.scale': ONES,
  'blocks.block_0.mixer.q_proj.kernel': NORMAL,
  'blocks.block_0.mixer.k_proj.kernel': NORMAL,
  'blocks.block_0.mixer.v_proj.kernel': NORMAL,
  'blocks.block_0.mixer.beta_proj.kernel': NORMAL,
  'blocks.block_0.mixer.gate_proj.kernel': NORMAL,
  'blocks.block_0.mixer.q_conv.kernel': UNIFORM,
  'blocks.block_0.mixer.k_conv.kernel': UNIFORM,
  'blocks.block_0.mixer.v_conv.kernel': UNIFORM,
  'blocks.block_0.mixer.head_norm.scale': ONES,
  'blocks.block_0.mixer.o_proj.kernel': NORMAL,
  'blocks.block_0.mlp_norm.scale': ONES,
  'blocks.block_0.mlp.gate.kernel': NORMAL,
  'blocks.block_0.mlp.up.kernel': NORMAL,
  'blocks.block_0.mlp.down.kernel': NORMAL,
  'final_norm.scale': ONES,
  'output.kernel': NORMAL,
}


@functools.cache
def _params(config=CONFIG):
  return language_model.init(config, jax.random.key(0))


def _by_name(params):
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def _assert_close(actual, expected):
  error = np.linalg.norm(actual - expected)
  assert error <= 1e-5 * np.linalg.norm(expected)


def _loss(config, params):
  logits, _ = language_model.apply(config, params, TOKENS)
  return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])


def test_initial_values_follow_the_table():
  config = config_lib.ModelConfig(
    vocab_size=200,
    model_width=64,
    num_layers=3,
    num_heads=4,
    delta_net=delta_net.DeltaNetConfig(use_output_gate=True),
  )
  params = _by_name(_params(config))
  assert params.keys() == INITIAL.keys()
  for name, leaf in params.items():
    assert leaf.dtype == np.float32, name
    if INITIAL[name] == ONES:
      np.testing.assert_array_equal(leaf, 1, err_msg=name)
      continue
    bound = 4**-0.5
    std = 0.02 if INITIAL[name] == NORMAL else bound / 3**0.5
    assert abs(leaf.mean()) < 4 * std / leaf.size**0.5, name
    assert abs(leaf.std() / std - 1) < 4 / (2 * leaf.size) ** 0.5, name
    if INITIAL[name] == UNIFORM:
      assert 0.95 * bound < np.abs(leaf).max() <= bound, name
    else:
      assert np.abs(leaf).max() > 2.5 * std, name
    if name.startswith('blocks'):
      assert not np.array_equal(leaf[0], leaf[1]), name


def test_tied_model_has_no_output_kernel():
  config = dataclasses.replace(CONFIG, tie_embeddings=True)
  params = jax.eval_shape(
    functools.partial(language_model.init, config), jax.random.key(0)
  )
  assert not params.keys() & {'output'}
  count = language_model.count_parameters
  assert count(CONFIG) - count(config) == 31 * 16


def test_count_equals_the_sizes_of_the_parameters():
  total = sum(leaf.size for leaf in jax.tree.leaves(_params()))
  assert language_model.count_parameters(CONFIG) == total


def _layers(config, params):
  """Yields (mixer, parameters) of every layer."""
  for repeat in range(config.num_repeats):
    for index, (mixer, length) in enumerate(config.runs):
      stacked = params['blocks'][f'block_{index}']
      for i in range(length):
        at = (repeat, i) if length > 1 else (repeat,)
        yield mixer, jax.tree.map(lambda leaf, at=at: leaf[at], stacked)


@pytest.mark.parametrize(
  ('tie', 'mixers'),
  [
    (False, ('delta_net',)),
    (True, ('delta_net', 'attention')),
    (False, HYBRID),
  ],
)
def test_scan_equals_a_loop_over_the_layers(tie, mixers):
  config = dataclasses.replace(CONFIG, tie_embeddings=tie, mixers=mixers)
  params = _params(config)
  logits, _ = language_model.apply(config, params, TOKENS)
  x = params['embedding']['embedding'][TOKENS]
  layers = list(_layers(config, params))
  assert len(layers) == config.num_layers
  for mixer, layer_params in layers:
    block = block_lib.Block(mixer, config, rngs=nnx.Rngs(0))
    nnx.update(block, layer_params)
    x, _ = block(x)
  final = norm.RMSNorm(16, eps=config.norm_eps)
  nnx.update(final, params['final_norm'])
  kernel = (
    params['embedding']['embedding'].T if tie else params['output']['kernel']
  )
  np.testing.assert_allclose(logits, final(x) @ kernel, rtol=1e-4, atol=1e-6)


def test_module_and_pure_functions_agree():
  key = jax.random.key(0)
  model = language_model.LanguageModel(CONFIG, rngs=nnx.Rngs(key))
  params = language_model.init(CONFIG, key)
  expected, cache = model(TOKENS, cache=model.init_cache(2))
  logits, pure_cache = language_model.apply(
    CONFIG, params, TOKENS, cache=language_model.init_cache(CONFIG, 2)
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-6)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    pure_cache,
    cache,
  )


def test_parameters_are_plain_dicts_of_arrays():
  def check(node):
    if isinstance(node, dict):
      assert all(isinstance(name, str) for name in node)
      for child in node.values():
        check(child)
    else:
      assert type(node) is type(jnp.zeros(()))

  check(_params())


@pytest.mark.parametrize('mixers', [('delta_net',), HYBRID])
def test_pieces_with_a_cache_equal_the_whole(mixers):
  apply = jax.jit(language_model.apply, static_argnums=0)
  config = dataclasses.replace(CONFIG, mixers=mixers)
  params = _params(config)
  ids = np.array([[1] * 4 + [2] * 5, [5] * 8 + [0]], np.int32)
  whole, none = apply(config, params, TOKENS, segment_ids=ids)
  cache, pieces = language_model.init_cache(config, 2), []
  for start, stop in ((0, 3), (3, 6), (6, 7), (7, 8), (8, 9)):
    piece = slice(start, stop)
    logits, cache = apply(
      config, params, TOKENS[:, piece], segment_ids=ids[:, piece], cache=cache
    )
    pieces.append(logits)
  assert none is None
  pieces = np.concatenate(pieces, axis=1)
  np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('repeats', [1, 2])
def test_remat_changes_no_gradient(repeats):
  params = dict(_params())
  block = params['blocks']['block_0']
  params['blocks'] = {
    'block_0': jax.tree.map(lambda leaf: leaf[:repeats], block)
  }
  gradients = {}
  policies = ('dots', 'mixer', 'offload', 'full')
  for remat in ('none', *policies):
    config = dataclasses.replace(
      CONFIG, num_layers=repeats, mixers=('delta_net',), remat=remat
    )
    loss = functools.partial(_loss, config)
    gradients[remat] = jax.jit(jax.grad(loss))(params)
  for remat in policies:
    jax.tree.map(_assert_close, gradients[remat], gradients['none'])


@pytest.mark.parametrize('remat', ['none', 'dots'])
@pytest.mark.parametrize(
  'mixers', [('attention',), ('attention', 'attention', 'sliding_window')]
)
def test_layers_written_out_change_no_gradient(mixers, remat):
  gradients, loops = {}, {}
  for scan_layers in (True, False):
    config = dataclasses.replace(
      CONFIG, num_layers=6, mixers=mixers, remat=remat, scan_layers=scan_layers
    )
    step = jax.jit(jax.grad(functools.partial(_loss, config)))
    compiled = step.lower(_params(config)).compile()
    gradients[scan_layers] = compiled(_params(config))
    loops[scan_layers] = compiled.as_text().count(' while(')
  jax.tree.map(_assert_close, gradients[False], gradients[True])
  assert loops[False] == 0 < loops[True]


def _kept(config, axis, num_devices):
  """Returns what a model leaves for its backward pass."""
  params = jax.eval_shape(
    lambda: language_model.init(config, jax.random.key(0))
  )
  tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
  kinds = (jax.sharding.AxisType.Auto,)
  devices = jax.devices()[:num_devices]

  def pullback(params, tokens):
    run = functools.partial(language_model.hidden_states, config)
    return jax.vjp(lambda params: run(params, tokens)[0], params)[1]

  mesh = jax.make_mesh((num_devices,), (axis,), kinds, devices=devices)
  with jax.set_mesh(mesh):
    return jax.tree.leaves(jax.eval_shape(pullback, params, tokens))


def _num_bytes(arrays):
  return sum(x.size * x.dtype.itemsize for x in arrays)


@pytest.mark.parametrize(
  ('mixer', 'axis'),
  [
    *itertools.product(
      ('delta_net', 'gated_delta_net', 'gla', 'hyena', 'mamba', 'h3'), ('fsdp',)
    ),
    ('delta_net', 'sequence'),
    ('gated_delta_net', 'sequence'),
  ],
)
def test_sharded_parameters_cost_no_activations(mixer, axis):
  # What recomputes less than it should, or saves twice, would show here.
  config = config_lib.ModelConfig(
    vocab_size=64,
    model_width=64,
    num_layers=2,
    mixers=(mixer,),
    dtype='float32',
  )
  one, two = (_num_bytes(_kept(config, axis, n)) for n in (1, 2))
  assert two <= 1.01 * one


@pytest.mark.parametrize('axis', ['fsdp', 'sequence'])
@pytest.mark.parametrize('mixers', [('delta_net',), ('delta_net',) * 2])
def test_no_copy_of_a_gathered_parameter_is_kept(mixers, axis):
  config = config_lib.ModelConfig(
    vocab_size=64,
    model_width=96,
    num_layers=4,
    mixers=mixers,
    dtype='bfloat16',
  )
  matrices = {
    x.shape
    for x in jax.tree.leaves(_params(config)['blocks'])
    if x.shape[-2] >= 8
  }
  assert len(matrices) >= 4
  copies = [x for x in _kept(config, axis, 1) if x.dtype == jnp.bfloat16]
  assert matrices <= {x.shape for x in copies}
  copies = [x for x in _kept(config, axis, 2) if x.dtype == jnp.bfloat16]
  assert not matrices & {x.shape for x in copies}


def test_remat_recomputes_what_it_says():
  def count(remat, operation):
    config = dataclasses.replace(CONFIG, remat=remat)
    gradient = jax.grad(functools.partial(_loss, config))
    jaxpr = str(jax.make_jaxpr(gradient)(_params()))
    return len(re.findall(rf'\b{operation}\[?', jaxpr))

  assert count('none', 'logistic') < count('dots', 'logistic')
  assert count('dots', 'dot_general') < count('full', 'dot_general')
  # The output of the mixer is kept: its last projection runs once.
  assert count('mixer', 'dot_general') < count('full', 'dot_general')
  # The recurrence, too, runs once where its output is kept.
  assert count('dots', 'dot_general') < count('offload', 'dot_general')


@pytest.mark.parametrize(('remat', 'runs'), [('dots', 1), ('full', 2)])
def test_attention_of_cudnn_runs_once_where_products_are_kept(
  monkeypatch, remat, runs
):
  # It is traced only, so that any machine passes for one that has it.
  monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91_000)
  monkeypatch.setattr(cudnn, 'check_compute_capability', lambda _: True)
  config = dataclasses.replace(
    CONFIG,
    mixers=('attention',),
    attention=attention.AttentionConfig(implementation='cudnn'),
    dtype='bfloat16',
    remat=remat,
  )
  params = jax.eval_shape(
    lambda: language_model.init(config, jax.random.key(0))
  )
  tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

  def loss(params, tokens):
    hidden, _ = language_model.hidden_states(config, params, tokens)
    return jnp.sum(hidden.astype(jnp.float32))

  jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params, tokens))
  assert jaxpr.count('dot_product_attention_fwd_wrapper[') == runs


def test_bfloat16_gives_close_float32_logits():
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  exact, _ = language_model.apply(CONFIG, _params(), TOKENS)
  logits, _ = language_model.apply(config, _params(), TOKENS)
  assert logits.dtype == jnp.float32
  # About four roundings of 2^-8 one after the other in each layer.
  bound = 4 * CONFIG.num_layers * 2**-8
  assert np.linalg.norm(logits - exact) < bound * np.linalg.norm(exact)
  gradients = jax.grad(functools.partial(_loss, config))(_params())
  for leaf in jax.tree.leaves(gradients):
    assert leaf.dtype == jnp.float32
    assert np.all(np.isfinite(leaf))


def test_cache_does_not_grow_with_the_text():
  _, cache = language_model.apply(
    CONFIG, _params(), TOKENS, cache=language_model.init_cache(CONFIG, 2)
  )
  for before, after in zip(
    jax.tree.leaves(language_model.init_cache(CONFIG, 2)),
    jax.tree.leaves(cache),
    strict=True,
  ):
    assert (before.shape, before.dtype) == (after.shape, after.dtype)


@pytest.mark.parametrize(
  ('tokens', 'message'),
  [
    (TOKENS[0], r'shape \[B, T\]'),
    (TOKENS.astype(np.float32), 'must be integers'),
  ],
)
def test_refuses_tokens(tokens, message):
  with pytest.raises(ValueError, match=message):
    language_model.apply(CONFIG, _params(), tokens)


def test_refuses_segment_ids_of_another_shape():
  with pytest.raises(ValueError, match='shape of tokens'):
    language_model.apply(CONFIG, _params(), TOKENS, segment_ids=TOKENS[:, :1])


def test_refuses_parameters_of_another_configuration():
  other = dataclasses.replace(CONFIG, vocab_size=32)
  with pytest.raises(ValueError, match=r'embedding.embedding must be \(32, 16'):
    language_model.apply(other, _params(), TOKENS)
  tied = dataclasses.replace(CONFIG, tie_embeddings=True)
  with pytest.raises(ValueError, match='output.kernel must be absent'):
    language_model.apply(tied, _params(), TOKENS)


def test_refuses_an_empty_batch():
  with pytest.raises(ValueError, match='batch must be at least 1'):
    language_model.init_cache(CONFIG, 0)
