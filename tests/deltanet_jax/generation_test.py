"""Generation: greedy equals the full pass, sampling, stopping, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import config as config_lib
from deltanet_jax import generation
from deltanet_jax import language_model
from deltanet_jax.layers import attention
from deltanet_jax.layers import delta_net

CONFIG = config_lib.ModelConfig(
  vocab_size=13,
  model_width=16,
  num_layers=2,
  num_heads=2,
  mlp_width=24,
  dtype='float32',
  # The quickest to compile; the layers' tests cover the others.
  delta_net=delta_net.DeltaNetConfig(implementation='recurrent'),
)
PROMPT = np.random.default_rng(0).integers(0, 13, (2, 7)).astype(np.int32)
LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))
GREEDY = generation.Sampling(greedy=True)


@functools.cache
def _params():
  params = language_model.init(CONFIG, jax.random.key(0))
  return jax.tree.map(lambda leaf: leaf * 3, params)


def _generate(prompt=PROMPT, *, num_tokens=6, seed=0, **options):
  steps = generation.generate(
    CONFIG,
    _params(),
    prompt,
    num_tokens=num_tokens,
    key=jax.random.key(seed),
    **options,
  )
  return np.stack(list(steps), axis=1)


def _frequencies(sampling, rows=20_000):
  logits = jnp.tile(LOGITS[None], (rows, 1))
  tokens = generation.sample(logits, jax.random.key(0), sampling)
  return np.bincount(tokens, minlength=LOGITS.size) / rows


@pytest.mark.parametrize('chunk', [1, 3, 256])
@pytest.mark.parametrize('length', [1, 7])
def test_greedy_equals_the_full_forward_pass(chunk, length):
  prompt = PROMPT[:, :length]
  tokens = _generate(prompt, sampling=GREEDY, prefill_chunk=chunk)
  text = np.concatenate([prompt, tokens], axis=1)
  logits, _ = language_model.apply(CONFIG, _params(), text)
  expected = np.argmax(logits, axis=-1)[:, length - 1 : -1]
  np.testing.assert_array_equal(tokens, expected)


def test_key_decides_the_text_and_the_chunk_does_not():
  text = _generate(seed=1, num_tokens=12)
  np.testing.assert_array_equal(text, _generate(seed=1, num_tokens=12))
  np.testing.assert_array_equal(
    text, _generate(seed=1, num_tokens=12, prefill_chunk=2)
  )
  assert not np.array_equal(text, _generate(seed=2, num_tokens=12))


def test_every_position_draws_anew():
  steps = generation.generate(
    CONFIG,
    jax.tree.map(jnp.zeros_like, _params()),  # Every token is as likely.
    PROMPT,
    num_tokens=12,
    key=jax.random.key(0),
  )
  assert all(
    len(set(row.tolist())) > 3 for row in np.stack(list(steps), axis=1)
  )


def test_text_goes_on_where_it_was_cut():
  text = _generate(seed=1, num_tokens=6)
  prompt = np.concatenate([PROMPT, text[:, :2]], axis=1)
  np.testing.assert_array_equal(
    _generate(prompt, seed=1, num_tokens=4), text[:, 2:]
  )


def test_stop_token_ends_a_row_and_then_the_generation():
  free = _generate(sampling=GREEDY, num_tokens=8)
  stop = int(free[0, 2])
  text = _generate(sampling=GREEDY, num_tokens=8, stop_token=stop)
  for row, expected in zip(text, free, strict=True):
    hits = np.flatnonzero(expected == stop)
    end = hits[0] if hits.size else expected.size
    np.testing.assert_array_equal(row[:end], expected[: min(end, row.size)])
    assert np.all(row[end:] == stop)
  alone = _generate(PROMPT[:1], sampling=GREEDY, num_tokens=8, stop_token=stop)
  first = np.flatnonzero(free[0] == stop)[0]
  np.testing.assert_array_equal(alone[0], free[0, : first + 1])


def test_prefill_pieces_are_few_and_complete():
  lengths = range(1, 700)
  pieces = [generation.prefill_lengths(length, 256) for length in lengths]
  assert [sum(piece) for piece in pieces] == list(lengths)
  assert len({size for piece in pieces for size in piece}) == 9
  assert generation.prefill_lengths(7, 3) == [3, 3, 1]


def test_sampling_follows_the_probabilities():
  expected = np.exp(LOGITS)
  np.testing.assert_allclose(
    _frequencies(generation.Sampling()), expected, atol=0.015
  )
  squared = expected**2 / np.sum(expected**2)
  np.testing.assert_allclose(
    _frequencies(generation.Sampling(temperature=0.5)), squared, atol=0.015
  )


def test_top_k_keeps_the_k_most_likely():
  np.testing.assert_allclose(
    _frequencies(generation.Sampling(top_k=2)),
    np.array([0, 0.4, 0, 0.3, 0]) / 0.7,
    atol=0.015,
  )
  np.testing.assert_allclose(
    _frequencies(generation.Sampling(top_k=99)), np.exp(LOGITS), atol=0.015
  )


@pytest.mark.parametrize(
  ('top_p', 'kept'), [(0.01, 1), (0.39, 1), (0.41, 2), (0.75, 3), (0.999, 5)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
  frequencies = _frequencies(generation.Sampling(top_p=top_p))
  best = np.argsort(-LOGITS)[:kept]
  expected = np.zeros(LOGITS.size)
  expected[best] = np.exp(LOGITS[best]) / np.sum(np.exp(LOGITS[best]))
  np.testing.assert_allclose(frequencies, expected, atol=0.015)
  assert np.count_nonzero(frequencies) == kept


def test_top_k_comes_before_top_p():
  sampling = generation.Sampling(top_k=2, top_p=0.5)
  np.testing.assert_array_equal(_frequencies(sampling), [0, 1, 0, 0, 0])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'temperature': 0.0}, 'temperature must be finite and above 0'),
    ({'temperature': float('nan')}, 'temperature must be finite'),
    ({'top_k': -1}, 'top_k must be at least 0, got -1'),
    ({'top_p': 0.0}, r'top_p must lie in \(0, 1\], got 0.0'),
    ({'top_p': 1.5}, r'top_p must lie in \(0, 1\], got 1.5'),
    ({'greedy': True, 'top_k': 3}, 'greedy=True excludes'),
  ],
)
def test_sampling_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    generation.Sampling(**fields)


@pytest.mark.parametrize(
  ('prompt', 'options', 'message'),
  [
    (PROMPT[0], {}, r'shape \[B, P\]'),
    (PROMPT[:, :0], {}, 'B, P >= 1'),
    (PROMPT.astype(np.float32), {}, 'must be integers'),
    (PROMPT + 13, {}, r'must lie in \[0, 13\)'),
    (PROMPT - 13, {}, r'must lie in \[0, 13\)'),
    (PROMPT, {'num_tokens': 0}, 'num_tokens must be at least 1'),
    (PROMPT, {'prefill_chunk': 0}, 'prefill_chunk must be at least 1'),
    (PROMPT, {'stop_token': 13}, 'stop_token must lie in'),
  ],
)
def test_generate_refuses_at_the_call(prompt, options, message):
  options = {'num_tokens': 1, **options}
  with pytest.raises(ValueError, match=message):
    generation.generate(
      CONFIG, _params(), prompt, key=jax.random.key(0), **options
    )


def test_refuses_more_tokens_than_attention_remembers():
  config = config_lib.ModelConfig(
    mixers=('attention',), attention=attention.AttentionConfig(cache_length=4)
  )
  with pytest.raises(ValueError, match='attention.cache_length, 4 tokens'):
    generation.generate(
      config, {}, [[1, 2]], num_tokens=4, key=jax.random.key(0)
    )
