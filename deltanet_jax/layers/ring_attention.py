"""Softmax attention over a row whose tokens are spread over devices.

Each device keeps its queries; keys and values go round the ring of devices, one
step at a time (Liu, Zaharia and Abbeel, arXiv 2310.01889). With m the greatest
logit so far, l the sum of exp(logit - m) and a the sum of exp(logit - m) v, a
step adds a block by

    m' = max(m, max s)    l' = exp(m - m') l + sum exp(s - m')    a' likewise

and o = a / l. The backward pass goes round once more, with p = exp(s - m - log
l) recomputed, and takes the gradients of keys and values along, which are home
after a full turn. No device ever holds more than two parts of a row, and a
sliding window stops the forward turn at the last part that it reaches.

Exchanged per device: 2 G K numbers per token of a part and step, n - 1 steps,
forward; twice that, in n steps, backward.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import sharded_call


class _Keys(NamedTuple):
  k: jax.Array  # [B, S, G, K]
  v: jax.Array  # [B, S, G, K]
  runs: jax.Array  # [B, S]; -1: padding


class _Ring(NamedTuple):
  axes: tuple[str, ...] | None
  window: int | None

  @property
  def size(self) -> int:
    return 1 if self.axes is None else jax.lax.axis_size(self.axes)

  def steps(self, length: int) -> int:
    """Returns how many parts, its own too, a query of a part can see."""
    if self.window is None:
      return self.size
    return min(self.size, 1 - (1 - self.window) // length)

  def turn(self, tree):
    """Sends everything to the next device."""
    if self.size == 1:
      return tree
    pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
    return jax.lax.ppermute(tree, self.axes, pairs)


def _logits(ring, q, keys, runs, step):
  """Returns float32 logits [B, G, R, T, S], -inf where nothing is seen."""
  length = q.shape[1]
  logits = jnp.einsum(
    'btgrk,bsgk->bgrts', q, keys.k, preferred_element_type=jnp.float32
  )
  index = 0 if ring.axes is None else jax.lax.axis_index(ring.axes)
  positions = jnp.arange(length)
  # A part that came round the end of the ring lies behind the query: negative.
  distance = positions[:, None] - positions[None] + step * length
  seen = (distance >= 0) & (step <= index)
  if ring.window is not None:
    seen &= distance < ring.window
  seen = seen[None] & (runs[:, :, None] == keys.runs[:, None])
  seen &= keys.runs[:, None] >= 0
  return jnp.where(seen[:, None, None], logits * q.shape[-1] ** -0.5, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, q, keys, runs):
  return _attend_fwd(ring, q, keys, runs)[0]


def _attend_fwd(ring, q, keys, runs):
  """Returns o [B, T, G, R, K]; q is of the same shape."""
  first = keys
  batch, length, groups, repeats, _ = q.shape
  rows = (batch, groups, repeats, length, 1)
  top, total = jnp.full(rows, -jnp.inf), jnp.zeros(rows)
  o = jnp.zeros((*rows[:-1], q.shape[-1]))  # [B, G, R, T, K]
  for step in range(ring.steps(length)):
    keys = ring.turn(keys) if step else keys
    logits = _logits(ring, q, keys, runs, step)
    new = jnp.maximum(top, logits.max(-1, keepdims=True))
    finite = jnp.where(jnp.isfinite(new), new, 0)
    p = jnp.exp(logits - finite)
    decay = jnp.exp(top - finite)
    values = jnp.einsum(
      'bgrts,bsgk->bgrtk',
      p.astype(q.dtype),
      keys.v,
      preferred_element_type=jnp.float32,
    )
    o, total = o * decay + values, total * decay + p.sum(-1, keepdims=True)
    top = new
  o = jnp.where(total > 0, o / jnp.where(total > 0, total, 1), 0)
  log_total = jnp.where(total > 0, top + jnp.log(total), jnp.inf)
  o = o.transpose(0, 3, 1, 2, 4).astype(q.dtype)
  return o, (q, first, runs, o, log_total)


def _attend_bwd(ring, residuals, do):
  q, keys, runs, o, log_total = residuals
  length, scale = q.shape[1], q.shape[-1] ** -0.5
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1)
  delta = delta.transpose(0, 2, 3, 1)[..., None]  # [B, G, R, T, 1]
  dq = jnp.zeros(q.shape)
  dk, dv = jnp.zeros(keys.k.shape), jnp.zeros(keys.v.shape)
  for step in range(ring.size):
    if step < ring.steps(length):
      p = jnp.exp(_logits(ring, q, keys, runs, step) - log_total)
      dp = product('btgrk,bsgk->bgrts', do, keys.v)
      dlogits = (p * (dp - delta) * scale).astype(q.dtype)
      dq += product('bgrts,bsgk->btgrk', dlogits, keys.k)
      dk += product('bgrts,btgrk->bsgk', dlogits, q)
      dv += product('bgrts,btgrk->bsgk', p.astype(q.dtype), do)
    keys, dk, dv = ring.turn((keys, dk, dv))
  dk, dv = dk.astype(q.dtype), dv.astype(q.dtype)
  return dq.astype(q.dtype), _Keys(dk, dv, None), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def ring_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  runs: jax.Array | None,
  *,
  window: int | None,
) -> jax.Array:
  """Attends causally within runs over the ambient mesh; see the module.

  Args:
    q: [B, T, H, K].
    k: [B, T, G, K]; G divides H.
    v: [B, T, G, K].
    runs: int32 [B, T], the number of a token's document in its row, -1 for
      padding; None: a row is one document.
    window: tokens that a query sees, its own included; None: all.

  Returns:
    o [B, T, H, K], 0 where a query sees nothing.
  """
  if runs is None:
    runs = jnp.zeros(q.shape[:2], jnp.int32)

  def run(arrays, time_axes):
    q, k = arrays['q'], arrays['k']
    grouped = q.reshape(*k.shape[:3], -1, q.shape[-1])  # [B, T, G, R, K]
    keys = _Keys(k, arrays['v'], arrays['runs'])
    o = _attend(_Ring(time_axes, window), grouped, keys, arrays['runs'])
    return (o.reshape(q.shape),)

  arguments = {
    'k': (k, 'B T H K'),
    'v': (v, 'B T H K'),
    'q': (q, 'B T HV K'),
    'runs': (runs, 'B T'),
  }
  (o,) = sharded_call.sharded_call(run, arguments, ('B T HV K',))
  return o
