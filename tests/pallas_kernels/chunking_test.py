"""Groups of chunks: layouts, moves between layouts, scans."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chunking


@pytest.mark.parametrize('chunk', [1, 3, 16, 64, 1000])
def test_a_layout_covers_the_tokens_with_little_padding(chunk):
  for length in range(1, 200):
    layout = chunking.layout(length, chunk)
    assert layout.chunk == min(chunk, length)
    assert 1 <= layout.chunks_per_group <= chunking.CHUNKS_PER_GROUP
    assert layout.group == layout.chunk * layout.chunks_per_group
    assert layout.length == layout.group * layout.groups
    padding = layout.length - length
    # Less than a chunk to fill one up, less than one per group to even them.
    assert 0 <= padding < layout.chunk * layout.groups


def test_padding_at_the_end_of_time():
  x = jnp.arange(1.0, 7.0).reshape(1, 3, 2)
  assert chunking.pad_time(None, 5) is None
  assert chunking.pad_time(x, 3) is x
  rows = np.arange(1.0, 7.0).reshape(3, 2).tolist()
  assert chunking.pad_time(x, 5)[0].tolist() == rows + 2 * [[0, 0]]
  assert chunking.pad_time(x, 5, 'edge')[0].tolist() == rows + 2 * [[5, 6]]


@pytest.mark.parametrize('rest', [(), (5,)])
@pytest.mark.parametrize('heads', [2, 6])
def test_chunks_hold_the_tokens_of_every_head(heads, rest):
  x = np.random.default_rng(0).standard_normal((3, 12, 2, *rest))
  x = np.asarray(jnp.asarray(x, jnp.bfloat16))
  chunks = chunking.to_chunks(jnp.asarray(x), 4, heads)
  assert chunks.shape == (4, 3, heads, 3, *rest)
  assert chunks.dtype == jnp.float32
  for m, b, h, c in np.ndindex(4, 3, heads, 3):
    np.testing.assert_array_equal(
      chunks[m, b, h, c], np.float32(x[b, 3 * m + c, h // (heads // 2)])
    )


@pytest.mark.parametrize('heads', [2, 6])
def test_from_chunks_is_the_transpose_of_to_chunks(heads):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((3, 12, 2, 5)), jnp.float32)
  d = jnp.asarray(rng.standard_normal((4, 3, heads, 3, 5)), jnp.float32)
  _, pullback = jax.vjp(lambda x: chunking.to_chunks(x, 4, heads), x)
  np.testing.assert_allclose(
    chunking.from_chunks(d, x), pullback(d)[0], rtol=1e-6, atol=1e-6
  )
  half = chunking.from_chunks(d, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize('reverse', [False, True])
def test_a_scan_over_groups(reverse):
  x = jnp.arange(24, dtype=jnp.float32).reshape(2, 12) + 1
  saved = jnp.array([10.0, 20.0, 30.0])
  inputs = (x, None)

  def step(state, parts, saved):
    part, absent = parts
    assert absent is None
    made = {'y': part.astype(jnp.bfloat16), 'z': part + state[:, None]}
    return state + jnp.sum(part, axis=1), made, state + saved

  state, written, kept = chunking.scan_groups(
    step,
    jnp.zeros(2),
    inputs,
    saved,
    groups=3,
    reverse=reverse,
  )
  groups = np.asarray(x).reshape(2, 3, 4)
  sums = groups.sum(-1)  # [2, 3]
  flip = np.s_[:, ::-1] if reverse else np.s_[:, :]
  before = (np.cumsum(sums[flip], axis=1) - sums[flip])[flip]  # [2, 3]
  np.testing.assert_array_equal(state, sums.sum(1))
  assert written['y'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(written['y'].astype('float32'), x)
  np.testing.assert_array_equal(
    written['z'], (groups + before[..., None]).reshape(2, 12)
  )
  np.testing.assert_array_equal(kept, before.T + saved[:, None])


@pytest.mark.parametrize('reverse', [False, True])
def test_a_scan_over_chunks(reverse):
  x = jnp.array([1.0, 2.0, 3.0])

  def step(state, xs):
    x, absent = xs
    assert absent is None
    return 10 * state + x, state

  state, states = chunking.scan_chunks(
    step, jnp.zeros(()), (x, None), reverse=reverse
  )
  assert state == (321 if reverse else 123)
  np.testing.assert_array_equal(states, [32, 3, 0] if reverse else [0, 1, 12])


def test_precision_for_inputs():
  assert chunking.precision_for(jnp.float32) == 'highest'
  assert chunking.precision_for(jnp.bfloat16) == 'default'


def test_products_and_their_gradients():
  rng = np.random.default_rng(0)
  x, y, d = (
    jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
    for shape in ((3, 5), (4, 5), (3, 4))
  )
  run = functools.partial(jnp.einsum, '...ik,...jk->...ij')
  expected, pullback = jax.vjp(run, x, y)
  actual, own_pullback = jax.vjp(chunking.outer, x, y)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  for a, e in zip(own_pullback(d), pullback(d), strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(
    chunking.transpose(x), np.swapaxes(np.asarray(x), 1, 2)
  )


@pytest.mark.parametrize('product', ['outer', 'gram'])
def test_a_known_product_is_taken_as_it_is_and_its_gradient_is_unchanged(
  product,
):
  rng = np.random.default_rng(0)
  x, y, d, known = (
    jnp.asarray(rng.standard_normal((2, *shape)), jnp.float32)
    for shape in ((4, 5), (4, 5), (4, 4), (4, 4))
  )
  arguments = (x, y) if product == 'outer' else (x,)
  run = getattr(chunking, product)
  _, expected = jax.vjp(run, *arguments)
  actual, pullback = jax.vjp(
    lambda *a: run(*a, known=known.astype(jnp.bfloat16)), *arguments
  )
  assert actual.dtype == jnp.float32
  np.testing.assert_array_equal(actual, known.astype(jnp.bfloat16))
  for a, e in zip(pullback(d), expected(d), strict=True):
    np.testing.assert_array_equal(a, e)
