import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

import deltanet_jax

BATCH, LENGTH, WIDTH, VOCAB = 4, 6, 8, 12
AXES = ('data', 'fsdp', 'sequence', 'tensor')


def arrays(dtype):
  draw = np.random.default_rng(0)
  hidden = draw.standard_normal((BATCH, LENGTH, WIDTH)) * 2
  kernel = draw.standard_normal((WIDTH, VOCAB))
  labels = draw.integers(VOCAB, size=(BATCH, LENGTH), dtype=np.int32)
  weights = draw.random((BATCH, LENGTH)) * (draw.random((BATCH, LENGTH)) < 0.7)
  return [
    jnp.asarray(y, y.dtype if y.dtype == np.int32 else dtype)
    for y in (hidden, kernel, labels, weights)
  ]


def plain(hidden, kernel, labels, weights):
  log_softmax = jax.nn.log_softmax(hidden @ kernel)
  picked = jnp.take_along_axis(log_softmax, labels[..., None], axis=-1)
  return -jnp.sum(picked[..., 0] * weights)


def per_token(hidden, kernel, labels, weights, chunk_size):
  losses = deltanet_jax.cross_entropy(
    hidden, kernel, labels, chunk_size=chunk_size
  )
  return jnp.sum(losses * weights)


def summed(hidden, kernel, labels, weights, chunk_size):
  return 2 * deltanet_jax.summed_cross_entropy(
    hidden, kernel, labels, weights, chunk_size=chunk_size
  )


def gradients(loss):
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 3)))


def assert_close(found, expected, factor=1.0, rtol=1e-12):
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, factor * b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize('chunk_size', [0, 1, 5, 24])
def test_value_and_gradients_are_those_of_the_plain_loss(chunk_size):
  with jax.enable_x64(True):
    given = arrays('float64')
    expected = gradients(plain)(*given)
    for loss, factor in ((per_token, 1.0), (summed, 2.0)):
      loss = functools.partial(loss, chunk_size=chunk_size)
      assert_close(gradients(loss)(*given), expected, factor)


@pytest.mark.parametrize(
  'shape',
  [(8, 1, 1, 1), (1, 4, 2, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 3, 2)]
  # What cuts the tokens but not the kernel, and the other way round.
  + [(1, 2, 3, 1), (1, 1, 8, 1)],
)
def test_a_mesh_changes_nothing(shape):
  with jax.enable_x64(True):
    given = arrays('float64')
    expected = gradients(plain)(*given)
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(
      shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices
    )
    loss = functools.partial(summed, chunk_size=2)
    with jax.set_mesh(mesh):
      assert_close(gradients(loss)(*given), expected, 2.0)


def test_bfloat16_sums_the_kernels_gradient_in_float32():
  hidden, kernel, labels, weights = arrays('float32')
  hidden = hidden.astype(jnp.bfloat16)
  loss = functools.partial(summed, chunk_size=2)
  _, (dx, dkernel, _) = gradients(loss)(hidden, kernel, labels, weights)
  assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)
  _, (_, expected, _) = gradients(plain)(
    hidden.astype(jnp.float32), kernel, labels, weights
  )
  error = np.linalg.norm(dkernel - 2 * expected) / np.linalg.norm(2 * expected)
  assert error < 0.008


def test_logits_of_all_tokens_do_not_exist():
  tokens, width, vocab = 4096, 32, 4096
  shapes = (
    jax.ShapeDtypeStruct((1, tokens, width), 'float32'),
    jax.ShapeDtypeStruct((width, vocab), 'float32'),
    jax.ShapeDtypeStruct((1, tokens), 'int32'),
    jax.ShapeDtypeStruct((1, tokens), 'float32'),
  )

  def temporary_bytes(loss):
    compiled = gradients(loss).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * tokens * vocab
  assert temporary_bytes(plain) > logits
  for loss in (per_token, summed):
    chunked = functools.partial(loss, chunk_size=64)
    assert temporary_bytes(chunked) < logits / 8
