"""Every registered mixer keeps the contract of `deltanet_jax.mixers`."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import config as config_lib
from deltanet_jax import generation
from deltanet_jax import language_model
from deltanet_jax import mixers
from tests import copy_task

BATCH, LENGTH, WIDTH = 2, 12, 16
# What is compiled here runs once or twice.
QUICK_JIT = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)
TOLERANCE = {'rtol': 1e-5, 'atol': 1e-5}
# An id that comes back, runs of one, padding at the start and at the end.
SEGMENT_IDS = np.array(
  [
    [1, 1, 1, 2, 2, 1, 1, 1, 1, 3, 0, 0],
    [0, 0, 7, 7, 7, 7, 7, 9, 4, 4, 4, 4],
  ],
  np.int32,
)
SPLITS = {
  'around_one_token': (1, 9, 2),
  'tokens': (1,) * LENGTH,
}
# Options in which a mixer is tested, where its defaults do not fit 12 tokens.
OPTIONS = {
  'attention': {'num_kv_heads': 1, 'qk_norm': True, 'cache_length': LENGTH},
  'sliding_window': {'window': 5},
  'delta_product': {'use_forget_gate': True},
  'abc': {'num_slots': 3},
  'gated_rfa': {'num_directions': 32},
  'gla': {'gate_rank': 3, 'use_short_conv': True},
  'h3': {'state_size': 3, 'shift_width': 4, 'head_width': 2, 'chunk_size': 5},
  'hyena': {'order': 3, 'filter_length': LENGTH, 'filter_width': 4},
  'multihead_hyena': {
    'filter_length': LENGTH,
    'filter_width': 4,
    'head_width': 4,
  },
  'mamba': {'state_size': 3, 'chunk_size': 5},
  'mamba2': {'state_size': 3},
  'gsa': {'num_slots': 3},
  'rwkv6': {'shift_rank': 3, 'decay_rank': 3},
  'rwkv7': {'decay_rank': 3, 'rate_rank': 3, 'gate_rank': 3},
}
# A product of spectra rounds the past by what the future holds.
BY_SPECTRA = ('hyena', 'multihead_hyena')
ATTENTION = ('attention', 'sliding_window')
# How many tokens back the first effect on a mixer may lie, if not all.
REACH = {'sliding_window': 5}
# float32 numbers that a row's state has in these options, as table 4 of the
# paper counts them (short convolutions and bookkeeping not included).
HEAD = WIDTH // 2
STATE_NUMBERS = {
  'attention': LENGTH * 2 * HEAD,
  'sliding_window': 5 * 2 * WIDTH,
  'delta_net': 2 * HEAD * HEAD,
  'gated_delta_net': 2 * HEAD * 2 * HEAD,
  'delta_product': 2 * HEAD * HEAD,
  'kimi_delta': 2 * HEAD * HEAD,
  'rwkv7': 2 * HEAD * HEAD,
  'block_delta_net': 2 * HEAD * HEAD,
  'linear_attention': 2 * HEAD * (HEAD + 1),
  'retnet': 2 * HEAD * 2 * HEAD,
  'gla': 2 * HEAD // 2 * HEAD,
  'mamba2': 2 * 3 * 2 * HEAD,
  'hgrn2': 2 * HEAD * HEAD,
  'mlstm': 2 * (HEAD // 2 * (HEAD + 1) + 1),
  'schlag': 2 * 2 * HEAD * HEAD,
  'mamba': 2 * WIDTH * 3,
  'rwkv4': 3 * WIDTH,
  # All that these hold are the caches of their convolutions.
  'hyena': 0,
  'multihead_hyena': 0,
  'h3': WIDTH * 2 * 3 * 2,
  'gated_rfa': 2 * 2 * 32 * (HEAD + 1),
  'rwkv6': 2 * HEAD * HEAD,
  'gsa': 2 * 3 * 2 * HEAD,
  'abc': 2 * 3 * (HEAD // 2 + HEAD + 1),
}


def _config(name, **fields):
  config = config_lib.ModelConfig(
    model_width=WIDTH, num_heads=2, num_layers=1, mixers=(name,), **fields
  )
  options = dataclasses.replace(getattr(config, name), **OPTIONS.get(name, {}))
  if hasattr(options, 'implementation') and name not in ATTENTION:
    options = dataclasses.replace(options, implementation='recurrent')
  return dataclasses.replace(config, **{name: options})


def _shown(path, leaf):
  """Replaces initial values that hide what twelve tokens can show."""
  if 'a_log' in path:  # Decays too fast for the first token to reach the last.
    return jnp.full_like(leaf, -1)
  if 'time_decay' in path:
    return jnp.full_like(leaf, -2)
  if "'i_proj'" in path and 'bias' in path:  # Writes of exp(-10).
    return jnp.zeros_like(leaf)
  return leaf


@functools.cache
def _mixer(name, dtype='float32'):
  """Returns a jitted pure function and parameters of a visible size."""
  mixer = mixers.build_mixer(name, _config(name, dtype=dtype), nnx.Rngs(0))
  graph, params = nnx.split(mixer)
  leaves, tree = jax.tree.flatten_with_path(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  params = tree.unflatten(
    _shown(jax.tree_util.keystr(path), leaf)
    + 0.3 * jax.random.normal(key, leaf.shape)
    for (path, leaf), key in zip(leaves, keys, strict=True)
  )

  @QUICK_JIT
  def run(params, x, segment_ids=None, cache=None):
    module = nnx.merge(graph, params)
    return module(x, segment_ids=segment_ids, cache=cache)

  return run, params, mixer


def _inputs():
  return jax.random.normal(jax.random.key(2), (BATCH, LENGTH, WIDTH))


def _in_pieces(name, x, lengths, segment_ids):
  """Runs the pieces of x with the cache carried on; returns y and the cache."""
  run, params, mixer = _mixer(name)
  cache, start, outputs = mixer.init_cache(x.shape[0]), 0, []
  for length in lengths:
    piece = slice(start, start + length)
    ids = None if segment_ids is None else segment_ids[:, piece]
    y, cache = run(params, x[:, piece], ids, cache)
    outputs.append(y)
    start += length
  return jnp.concatenate(outputs, axis=1), cache


@pytest.fixture(params=sorted(mixers.MIXERS))
def name(request):
  return request.param


def test_unknown_name_lists_the_known_ones():
  config = config_lib.ModelConfig()
  with pytest.raises(ValueError, match="one of .*delta_net.* got 'mumble'"):
    mixers.build_mixer('mumble', config, nnx.Rngs(0))


def test_future_does_not_change_the_past(name):
  run, params, _ = _mixer(name)
  x = _inputs()
  y, _ = run(params, x)
  changed, _ = run(params, x.at[:, 7:].add(1.0))
  rounding = 1e-5 if name in BY_SPECTRA else 0
  np.testing.assert_allclose(y[:, :7], changed[:, :7], rtol=0, atol=rounding)
  assert np.all(np.any(y[:, 7:] != changed[:, 7:], axis=-1))


def test_past_reaches_the_end(name):
  run, params, _ = _mixer(name)
  x = _inputs()
  y, _ = run(params, x)
  first = LENGTH - REACH.get(name, LENGTH)
  changed, _ = run(params, x.at[:, first].add(1.0))
  assert np.max(np.abs(y[:, -1] - changed[:, -1])) > 1e-4
  if first:
    changed, _ = run(params, x.at[:, first - 1].add(1.0))
    np.testing.assert_array_equal(y[:, -1], changed[:, -1])


def test_state_has_the_size_of_the_paper(name):
  _, _, mixer = _mixer(name)
  cache = mixer.init_cache(1)
  state = cache.state if hasattr(cache, 'state') else (cache.k, cache.v)
  assert (
    sum(leaf.size for leaf in jax.tree.leaves(state)) == (STATE_NUMBERS[name])
  )


@pytest.mark.parametrize('split', SPLITS)
def test_pieces_equal_the_whole(name, split):
  run, params, mixer = _mixer(name)
  x = _inputs()
  pieces, cache = _in_pieces(name, x, SPLITS[split], SEGMENT_IDS)
  np.testing.assert_allclose(
    pieces, run(params, x, SEGMENT_IDS)[0], **TOLERANCE
  )
  _, expected = run(params, x, SEGMENT_IDS, mixer.init_cache(BATCH))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, **TOLERANCE), cache, expected
  )


def test_tokens_without_ids_are_one_document(name):
  run, params, _ = _mixer(name)
  x = _inputs()
  y, _ = run(params, x)
  pieces, cache = _in_pieces(name, x, SPLITS['tokens'], None)
  np.testing.assert_allclose(pieces, y, **TOLERANCE)
  np.testing.assert_array_equal(cache.segment_id, 1)


def test_parameters_start_as_float32(name):
  _, _, mixer = _mixer(name, 'bfloat16')
  params = nnx.to_pure_dict(nnx.state(mixer))
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    assert leaf.dtype == jnp.float32 and not leaf.weak_type, path
    assert np.all(np.isfinite(leaf)), path
    assert all(isinstance(key.key, str) for key in path), path


def test_no_cache_in_no_cache_out(name):
  run, params, _ = _mixer(name)
  assert run(params, _inputs())[1] is None


def test_segments_equal_separate_runs(name):
  run, params, _ = _mixer(name)
  x = _inputs()
  y, _ = run(params, x, SEGMENT_IDS)
  for row, ids in enumerate(SEGMENT_IDS):
    bounds = [0, *(np.flatnonzero(np.diff(ids)) + 1), LENGTH]
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
      piece = slice(start, stop)
      alone, _ = run(params, x[row : row + 1, piece])
      expected = alone[0] if ids[start] else np.zeros_like(alone[0])
      np.testing.assert_allclose(y[row, piece], expected, **TOLERANCE)


@pytest.mark.parametrize('length', [1, 2])
def test_other_document_forgets_the_cache(name, length):
  run, params, _ = _mixer(name)
  x = _inputs()
  ids = np.full((BATCH, LENGTH), 1, np.int32)
  _, cache = _in_pieces(name, x, (LENGTH,), ids)
  fresh, _ = run(params, x[:, :length])
  other = np.full((BATCH, length), 2, np.int32)
  y, _ = run(params, x[:, :length], other, cache)
  np.testing.assert_allclose(y, fresh, **TOLERANCE)
  same, _ = run(params, x[:, :length], other - 1, cache)
  carried_on, _ = run(params, x[:, :length], None, cache)
  np.testing.assert_allclose(same, carried_on, **TOLERANCE)
  assert np.max(np.abs(same - fresh)) > 1e-3


@pytest.mark.parametrize('length', [1, 2])
def test_padding_touches_no_state(name, length):
  run, params, _ = _mixer(name)
  x = _inputs()
  _, cache = _in_pieces(name, x, (LENGTH,), None)
  zeros = np.zeros((BATCH, length), np.int32)
  y, after = run(params, x[:, :length], zeros, cache)
  np.testing.assert_array_equal(y, np.zeros_like(y))
  if hasattr(cache, 'state'):
    jax.tree.map(np.testing.assert_array_equal, after.state, cache.state)


def test_gradients_are_finite_and_reach_every_parameter(name):
  run, params, _ = _mixer(name)
  x = _inputs()
  weights = jax.random.normal(jax.random.key(3), x.shape)

  def loss(params, x):
    return jnp.sum(weights * run.__wrapped__(params, x, SEGMENT_IDS)[0])

  gradients = QUICK_JIT(jax.grad(loss, argnums=(0, 1)))(params, x)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.all(np.isfinite(leaf)), path
    assert np.any(leaf != 0), path


def test_bfloat16_is_close(name):
  run, params, _ = _mixer(name)
  run_bfloat16, _, _ = _mixer(name, 'bfloat16')
  x = _inputs()
  y, _ = run(params, x)
  low, _ = run_bfloat16(params, x.astype(jnp.bfloat16))
  assert low.dtype == jnp.bfloat16
  error = np.linalg.norm(low.astype(jnp.float32) - y) / np.linalg.norm(y)
  assert error < 0.03


def test_learns_in_a_scan_over_depth_with_remat(name):
  """Two scanned layers, recomputed in the backward pass, learn to copy."""
  config = dataclasses.replace(
    _config(name, vocab_size=5, mlp_width=8, dtype='float32', remat='full'),
    num_layers=2,
  )
  params = language_model.init(config, jax.random.key(0))
  losses = copy_task.train(
    config, params, QUICK_JIT, num_steps=12, learning_rate=0.02
  )
  assert np.all(np.isfinite(losses))
  assert losses[-1] < 0.9 * losses[0]


def test_generates_what_the_whole_model_predicts(name):
  """Greedy tokens, from the cache, are those of the model without one."""
  config = dataclasses.replace(
    _config(name, vocab_size=5, mlp_width=8, dtype='float32'), num_layers=2
  )
  params = language_model.init(config, jax.random.key(0))
  params = jax.tree.map(lambda leaf: 3 * leaf, params)
  prompt = [[1, 2, 3, 0]]
  tokens = generation.generate(
    config,
    params,
    prompt,
    num_tokens=4,
    key=jax.random.key(0),
    sampling=generation.Sampling(greedy=True),
    prefill_chunk=4,
  )
  text = np.concatenate([prompt, np.stack(list(tokens), axis=1)], axis=1)
  apply = QUICK_JIT(functools.partial(language_model.apply, config))
  logits, _ = apply(params, text)
  np.testing.assert_array_equal(text[:, 4:], logits.argmax(-1)[:, 3:-1])
