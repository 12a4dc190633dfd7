import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deltanet_jax
from experiments import config as config_lib
from experiments.data import token_store
from experiments.evaluation import held_out

MODEL = deltanet_jax.ModelConfig(
  vocab_size=11,
  model_width=8,
  num_layers=2,
  num_heads=2,
  mlp_width=8,
  dtype='float32',
)


def make_split(*lengths, bytes_per_token=1):
  """Returns documents of that many tokens, BOS (token 0) included."""
  draw = np.random.default_rng(0)
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  tokens = draw.integers(1, 11, size=offsets[-1]).astype(np.uint16)
  tokens[offsets[:-1]] = 0
  num_bytes = (len(tokens) - len(lengths)) * bytes_per_token
  return token_store.Split('validation', tokens, offsets, num_bytes)


@pytest.fixture(scope='module')
def params():
  # Larger than initial ones, so that what a token sees changes its loss.
  leaves = deltanet_jax.init(MODEL, jax.random.key(0))
  return jax.tree.map(lambda leaf: 3 * leaf, leaves)


def evaluate(params, split, context_length, batch_size=3, num_tokens=None):
  config = config_lib.EvaluationConfig(
    context_length=context_length, batch_size=batch_size
  )
  return held_out.evaluate(MODEL, params, split, config, num_tokens=num_tokens)


@pytest.mark.parametrize('context_length', [2, 4, 10, 64])
@pytest.mark.parametrize(
  'lengths', [(2,), (11,), (12,), (5, 1, 7), (1, 20), (3, 3, 3, 4), (31,)]
)
def test_every_token_but_bos_is_scored_once(lengths, context_length):
  split = make_split(*lengths)
  windows = held_out.OverlappingWindows(split, context_length)
  scored = []
  for index in range(len(windows)):
    window = windows[index]
    start = (index - 1) * context_length // 2
    ids = window['segment_ids']
    counts = window['scored'][1:] & (ids[1:] == ids[:-1]) & (ids[1:] > 0)
    for column in np.flatnonzero(counts) + 1:
      scored.append(start + column)
      assert window['tokens'][column] == split.tokens[start + column]
      # Half a window, or the whole text, is before it.
      assert column > context_length // 2
  expected = set(range(len(split.tokens))) - set(split.offsets[:-1].tolist())
  assert sorted(scored) == sorted(expected)


def brute_force(params, split):
  """Returns the summed loss, each document read whole and alone."""
  total = 0.0
  for start, stop in zip(split.offsets, split.offsets[1:], strict=False):
    tokens = jnp.array(split.tokens[start:stop].astype(np.int32))[None]
    if stop - start > 1:
      logits, _ = deltanet_jax.apply(MODEL, params, tokens[:, :-1])
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, tokens[:, 1:]
      )
      total += float(losses.sum())
  return total


@pytest.mark.parametrize('lengths', [(16,), (9, 1, 17), (6, 6, 6)])
def test_with_all_of_a_document_in_sight_it_is_the_exact_loss(params, lengths):
  split = make_split(*lengths)
  result = evaluate(params, split, context_length=64)
  assert result['tokens'] == sum(lengths) - len(lengths)
  np.testing.assert_allclose(
    result['loss'], brute_force(params, split) / result['tokens'], rtol=1e-5
  )


@pytest.mark.parametrize('batch_size', [1, 2, 7, 50])
def test_the_batch_size_changes_nothing(params, batch_size):
  split = make_split(30, 1, 40, 7)
  expected = evaluate(params, split, context_length=8, batch_size=3)
  result = evaluate(params, split, context_length=8, batch_size=batch_size)
  assert result['tokens'] == expected['tokens'] == 74
  np.testing.assert_allclose(result['loss'], expected['loss'], rtol=1e-6)


def test_bits_per_byte_of_a_uniform_model(params):
  uniform = jax.tree.map(jnp.zeros_like, params)
  split = make_split(9, 13, bytes_per_token=4)
  result = evaluate(uniform, split, context_length=8)
  np.testing.assert_allclose(result['loss'], math.log(11), rtol=1e-6)
  # 20 predicted tokens of log2(11) bits spell 80 bytes.
  np.testing.assert_allclose(
    result['bits_per_byte'], 20 * math.log2(11) / 80, rtol=1e-6
  )


def test_a_subset_is_spread_over_the_split(params, monkeypatch):
  read = []
  getitem = held_out.OverlappingWindows.__getitem__

  def note(windows, index):
    read.append(int(index))
    return getitem(windows, index)

  monkeypatch.setattr(held_out.OverlappingWindows, '__getitem__', note)
  split = make_split(101)  # 25 windows of 4 scored tokens.
  result = evaluate(params, split, context_length=8, num_tokens=20)
  assert read == [0, 6, 12, 18, 24]
  assert result['tokens'] == 20


@pytest.mark.parametrize('num_tokens', [100, 101, 10_000])
def test_more_tokens_than_there_are_reads_all_once(params, num_tokens):
  split = make_split(101)
  expected = evaluate(params, split, context_length=8)
  assert expected == evaluate(
    params, split, context_length=8, num_tokens=num_tokens
  )


@pytest.mark.parametrize('lengths', [(), (1,), (1, 1)])
def test_nothing_to_predict_is_an_error(params, lengths):
  with pytest.raises(ValueError, match='no token to predict'):
    evaluate(params, make_split(*lengths), context_length=8)


def test_it_moves_nothing_to_or_from_the_device_unasked(params):
  split = make_split(20)
  with jax.transfer_guard('disallow'):
    result = evaluate(params, split, context_length=8)
  assert result['tokens'] == 19
