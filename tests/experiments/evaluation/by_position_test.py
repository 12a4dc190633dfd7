import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deltanet_jax
from experiments.data import token_store
from experiments.evaluation import by_position

MODEL = deltanet_jax.ModelConfig(
  vocab_size=32,
  model_width=8,
  num_layers=2,
  num_heads=2,
  mlp_width=8,
  mixers=('delta_net', 'attention'),
  dtype='float32',
)
REACH = by_position.Reach(training_length=4, times=2, max_scored=8)


def make_split(*lengths):
  """Returns documents of that many tokens; each token is its own index."""
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  tokens = np.arange(offsets[-1], dtype=np.uint16)
  return token_store.Split('validation', tokens, offsets, len(tokens))


def test_the_windows_of_a_document_token_by_token():
  # Of 7, 12 and 2 tokens the second has 8 after its first, token 7. It has five
  # whole stretches of 2, the last two of which are scored: 14, 15 and 16, 17.
  windows = by_position.ContextWindows(make_split(7, 12, 2), REACH)
  assert windows.num_documents == 1
  found = [(w['tokens'].tolist(), w['scored'].tolist()) for w in windows]
  tokens, scored = zip(*found, strict=True)
  assert tokens == (
    [7, 8, 9, 10, 11, 12, 13, 14, 15],
    [9, 10, 11, 12, 13, 14, 15, 16, 17],
    [11, 12, 13, 14, 15, 16, 17, 0, 0],
    [13, 14, 15, 16, 17, 0, 0, 0, 0],
    [15, 16, 17, 0, 0, 0, 0, 0, 0],
  )
  assert [np.flatnonzero(row).tolist() for row in scored] == [
    [7, 8],
    [5, 6, 7, 8],
    [3, 4, 5, 6],
    [1, 2, 3, 4],
    [1, 2],
  ]


@pytest.mark.parametrize('max_scored', [1, 2, 100])
@pytest.mark.parametrize(('length', 'times'), [(2, 1), (4, 3), (6, 2)])
def test_a_scored_token_is_at_one_position_of_every_stretch(
  length, times, max_scored
):
  split = make_split(30, 5, 13, 12, 14, 41)
  reach = by_position.Reach(
    training_length=length, times=times, max_scored=max_scored
  )
  windows = by_position.ContextWindows(split, reach)
  long_enough = [d for d in range(6) if len(split.document(d)) >= reach.length]
  assert windows.num_documents == len(long_enough)
  stretches = collections.defaultdict(list)
  for window in windows:
    start = split.offsets[long_enough[int(window['document'])]]
    first = window['tokens'][0]
    for position in np.flatnonzero(window['scored']):
      token = int(window['tokens'][position])
      # All between are those of the document, none of them before its first.
      assert token == first + position and first >= start
      stretches[token].append((position - 1) // (length // 2))
  for token, found in stretches.items():
    assert sorted(found) == list(range(2 * times)), token
  for document in long_enough:
    size = len(split.document(document)) // (length // 2) * (length // 2)
    begin = split.offsets[document] + reach.length - length // 2 + 1
    end = min(split.offsets[document] + size + 1, begin + max_scored * length)
    owned = [
      t for t in stretches if begin - 1 < t < split.offsets[document + 1]
    ]
    assert sorted(owned) == list(range(begin, end))


@pytest.fixture(scope='module')
def params():
  # Larger than initial ones, so that what a token sees changes its loss.
  leaves = deltanet_jax.init(MODEL, jax.random.key(0))
  return jax.tree.map(lambda leaf: 3 * leaf, leaves)


def brute_force(params, split):
  """Returns the positions of REACH and losses, a row per context."""
  positions, contexts = [], []
  for document in range(split.num_documents):
    start, size = split.offsets[document], len(split.document(document))
    for token in range(start + 7, start + 2 * (size // 2) + 1):
      for position in range(1, 9):
        # Windows start at every second token of the document.
        if size >= 8 and (token - position - start) % 2 == 0:
          context = split.tokens[token - position : token + 1]
          contexts.append(np.pad(context, (0, 8 - position)))
          positions.append(position)
  contexts = jnp.array(np.stack(contexts).astype(np.int32))  # [contexts, 9]
  logits, _ = jax.jit(deltanet_jax.apply, static_argnums=0)(
    MODEL, params, contexts[:, :-1]
  )
  row, column = np.arange(len(positions)), np.array(positions)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits[row, column - 1], contexts[row, column]
  )
  return column, np.asarray(losses)


def test_losses_are_those_of_every_context_alone(params):
  split = make_split(3, 12, 9, 8)
  rows = by_position.evaluate(MODEL, params, split, REACH, batch_size=2)
  bounds = [(row['first'], row['last']) for row in rows]
  assert bounds == [(1, 2), (3, 4), (5, 6), (7, 8)]
  positions, losses = brute_force(params, split)
  for row in rows:
    chosen = (positions >= row['first']) & (positions <= row['last'])
    assert row['tokens'] == chosen.sum()
    assert row['documents'] == 2
    np.testing.assert_allclose(row['loss'], losses[chosen].mean(), rtol=1e-5)
  assert [row['tokens'] for row in rows] == [6, 6, 6, 6]
  # A batch of another size, the last one not full, changes nothing.
  found = by_position.evaluate(MODEL, params, split, REACH, batch_size=5)
  np.testing.assert_allclose(
    [row['loss'] for row in found], [row['loss'] for row in rows], rtol=1e-6
  )


def test_errors_are_those_between_documents():
  # Two documents with 2 and 6 tokens in each of four buckets.
  sums = np.array([[1.0, 4.0, 7.0, 4.0], [15.0, 12.0, 9.0, 12.0]])
  counts = np.array([[2] * 4, [6] * 4])
  rows = by_position.summarize(sums, counts, REACH)
  bounds = [(row['first'], row['last'], row['tokens']) for row in rows]
  assert bounds == [(1, 2, 8), (3, 4, 8), (5, 6, 8), (7, 8, 8)]
  # All means are 2, from which the sums of the documents differ by 3, 0, 3, 0.
  assert [row['loss'] for row in rows] == [2, 2, 2, 2]
  errors = [row['standard_error'] for row in rows]
  assert errors == pytest.approx([3 / 8 * 2, 0, 3 / 8 * 2, 0])
  errors = [row['change_standard_error'] for row in rows]
  assert errors == pytest.approx([3 / 8 * 2, 0, 3 / 8 * 2, 0])


def test_an_error_common_to_all_positions_is_none_of_the_change():
  counts = np.full((3, 4), 4)
  harder = np.array([[0.0], [3.0], [9.0]])
  sums = 4 * (np.array([[3.0, 2.0, 5.0, 1.0]]) + harder)
  rows = by_position.summarize(sums, counts, REACH)
  for row, change in zip(rows, [1, 0, 3, -1], strict=True):
    assert row['change'] == pytest.approx(change)
    assert row['change_standard_error'] == pytest.approx(0, abs=1e-12)
    # That of a mean of three: 0, 3 and 9 deviate by sqrt(21).
    assert row['standard_error'] == pytest.approx(math.sqrt(21 / 3))


def test_a_single_document_has_no_error():
  reach = by_position.Reach(training_length=2, times=1, max_scored=1)
  for row in by_position.summarize(np.ones((1, 2)), np.ones((1, 2)), reach):
    assert row['standard_error'] is row['change_standard_error'] is None


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match='has 8 tokens, 2 times the training'):
    by_position.ContextWindows(make_split(8, 2), REACH)
  with pytest.raises(ValueError, match='must be even, got 3'):
    by_position.Reach(training_length=3, times=2, max_scored=1)
  with pytest.raises(ValueError, match='times must be at least 1, got 0'):
    by_position.Reach(training_length=4, times=0, max_scored=1)
