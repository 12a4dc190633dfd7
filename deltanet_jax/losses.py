"""Cross-entropy of a large vocabulary, without the logits of all tokens.

With hidden states x [N, D], the output kernel W [D, V] and labels y [N],

    loss_n = log sum_v exp(x_n W_v) - x_n W_{y_n}             in nats.

The tokens are cut into chunks, so that no more than `MAX_LOGITS` logits exist
at a time. `cross_entropy` gives every token's loss; `summed_cross_entropy` the
weighted sum, and takes the gradients in the same pass over the chunks: with
p = softmax(x W) they are dx_n = w_n (p_n - onehot(y_n)) W^T and
dW = sum_n x_n^T w_n (p_n - onehot(y_n)), so no product is computed twice. The
sum over chunks of dW is in float32.

On an ambient mesh every device takes its own tokens and its own part of the
vocabulary: maxima, sums and the labels' logits meet over `tensor`, dW is
scattered over `sharding.SHARDS` and summed over the other axes once, after the
chunks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax import sharding

MAX_LOGITS = 2**25  # 128 MiB in float32.
_NAME = 'output.kernel'


class _Chunk(NamedTuple):
  x: jax.Array  # [C, D]
  labels: jax.Array  # [C]
  weights: jax.Array  # [C]


def _wide(x):
  """Returns the dtype of sums: float32, or what is wider."""
  return x.dtype if x.dtype == jnp.float64 else jnp.dtype(jnp.float32)


def _across(reduce, x, axis):
  return x if axis is None else reduce(x, axis)


def _softmax(x, kernel, labels, axis):
  """Returns losses [C], softmax [C, V] and one-hot labels [C, V]."""
  logits = jnp.dot(x, kernel, preferred_element_type=_wide(x))
  top = jax.lax.stop_gradient(logits.max(1, keepdims=True))
  logits = logits - _across(jax.lax.pmax, top, axis)
  exponentials = jnp.exp(logits)
  total = _across(jax.lax.psum, exponentials.sum(1), axis)  # [C]
  first = 0 if axis is None else jax.lax.axis_index(axis) * kernel.shape[1]
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + first
  is_label = ids == labels[:, None]
  label = jnp.sum(logits, 1, where=is_label)
  losses = jnp.log(total) - _across(jax.lax.psum, label, axis)
  return losses, exponentials / total[:, None], is_label


def _chunked(tree, vocab, chunk_size):
  """Cuts arrays [N, ...] into [chunks, C, ...], zeros at the end."""
  length = jax.tree.leaves(tree)[0].shape[0]
  size = min(chunk_size or max(1, MAX_LOGITS // vocab), length)
  count = -(-length // size)

  def cut(y):
    padding = [(0, count * size - length)] + [(0, 0)] * (y.ndim - 1)
    return jnp.pad(y, padding).reshape(count, size, *y.shape[1:])

  return jax.tree.map(cut, tree)


def _flat(tree):
  return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), tree)


def _losses(x, kernel, labels, axis, chunk_size):
  """Returns the losses [B, T] of a device's own tokens."""

  @jax.checkpoint
  def run(chunk):
    return _softmax(chunk[0], kernel, chunk[1], axis)[0]

  chunks = _chunked(_flat((x, labels)), kernel.shape[1], chunk_size)
  losses = jax.lax.map(run, chunks)
  return losses.ravel()[: labels.size].reshape(labels.shape)


def _losses_and_gradients(x, kernel, labels, weights, axis, chunk_size):
  """Returns losses [B, T], dx [B, T, D] and dW [D, V], by own tokens."""
  wide = _wide(x)

  def run(dkernel, chunk):
    losses, softmax, is_label = _softmax(chunk.x, kernel, chunk.labels, axis)
    dlogits = (softmax - is_label.astype(wide)) * chunk.weights[:, None]
    dlogits = dlogits.astype(x.dtype)
    dx = jnp.einsum('nv,dv->nd', dlogits, kernel)
    dkernel += jnp.einsum(
      'nd,nv->dv', chunk.x, dlogits, preferred_element_type=wide
    )
    return dkernel, (losses, dx)

  chunks = _chunked(
    _flat(_Chunk(x, labels, weights.astype(wide))), kernel.shape[1], chunk_size
  )
  start = jnp.zeros(kernel.shape, wide)
  if chunks.labels.shape[0] == 1:
    chunk = jax.tree.map(lambda y: y[0], chunks)
    dkernel, (losses, dx) = run(start, chunk)
  else:
    dkernel, (losses, dx) = jax.lax.scan(run, start, chunks)
    dx = dx.reshape(-1, x.shape[-1])
  losses = losses.ravel()[: labels.size].reshape(labels.shape)
  return losses, dx[: labels.size].reshape(x.shape), dkernel


def _on_mesh(run, x, kernel, labels, others=()):
  """Calls `run(x, kernel, labels, *others, axis)` on every device's share.

  Returns:
    losses [B, T], and where `run` returns them dx [B, T, D] and dW [D, V].
  """
  if jax.sharding.get_abstract_mesh().empty:
    return run(x, kernel.astype(x.dtype), labels, *others, axis=None)
  spec = sharding.parameter_spec(_NAME, kernel.shape)
  tokens = sharding.activation_spec('tokens', labels.shape)
  stream = jax.P(*tokens, None)

  def body(x, kernel, labels, *others):
    kernel = sharding.gather_share(kernel.astype(x.dtype), spec)
    results = run(x, kernel, labels, *others, axis=spec[1])
    if not isinstance(results, tuple):
      return results
    losses, dx, dkernel = results
    dkernel = sharding.reduce_to_share(dkernel, spec, tokens)
    return losses, _across(jax.lax.psum, dx, spec[1]), dkernel

  results = (tokens, stream, spec) if others else tokens
  specs = (stream, spec, tokens, *(tokens for _ in others))
  return sharding.shard_map(body, specs, results)(x, kernel, labels, *others)


def cross_entropy(
  hidden: jax.Array,
  kernel: jax.Array,
  labels: jax.Array,
  *,
  chunk_size: int = 0,
) -> jax.Array:
  """Returns the loss of every token in nats, float32 [B, T].

  Args:
    hidden: [B, T, D], see `deltanet_jax.hidden_states`.
    kernel: float32 [D, V]; the products are taken in the dtype of `hidden`.
    labels: int32 [B, T], in [0, V).
    chunk_size: tokens of a chunk (on one device); 0: by `MAX_LOGITS`.
  """
  run = functools.partial(_losses, chunk_size=chunk_size)
  return _on_mesh(run, hidden, kernel, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(hidden, kernel, labels, weights, chunk_size):
  losses = cross_entropy(hidden, kernel, labels, chunk_size=chunk_size)
  return jnp.sum(losses * weights)


def _summed_fwd(hidden, kernel, labels, weights, chunk_size):
  run = functools.partial(_losses_and_gradients, chunk_size=chunk_size)
  losses, dx, dkernel = _on_mesh(run, hidden, kernel, labels, (weights,))
  return jnp.sum(losses * weights), (losses, dx, dkernel.astype(kernel.dtype))


def _summed_bwd(chunk_size, residuals, g):
  del chunk_size
  losses, dx, dkernel = residuals
  return dx * g.astype(dx.dtype), dkernel * g, None, losses * g


_summed.defvjp(_summed_fwd, _summed_bwd)


def summed_cross_entropy(
  hidden: jax.Array,
  kernel: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  *,
  chunk_size: int = 0,
) -> jax.Array:
  """Returns the weighted sum of `cross_entropy`, a scalar.

  Its value and its gradients cost three products of N D V in all.

  Args:
    hidden: as of `cross_entropy`.
    kernel: as of `cross_entropy`.
    labels: as of `cross_entropy`.
    weights: float32 [B, T].
    chunk_size: as of `cross_entropy`.
  """
  return _summed(hidden, kernel, labels, weights, chunk_size)
