"""Runs a recurrence over groups of chunks of the time axis.

The plain-XLA implementations cut T into chunks of C tokens and do everything of
M neighbouring chunks, a group, in one step of one `lax.scan`: what needs no
state is computed for the M chunks at once, what needs it chunk by chunk. So
temporary memory is a group's, and small products come in batches.

Arrays of a group have the shape [M, B, H, C, ...], in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CHUNKS_PER_GROUP = 4


class Layout(NamedTuple):
  """How a time axis is cut: whole groups of equally long chunks."""

  chunk: int
  chunks_per_group: int
  groups: int

  @property
  def group(self) -> int:
    """Tokens of a group."""
    return self.chunk * self.chunks_per_group

  @property
  def length(self) -> int:
    """Tokens of all groups, padding included."""
    return self.group * self.groups


def layout(
  length: int, chunk: int, chunks_per_group: int = CHUNKS_PER_GROUP
) -> Layout:
  """Returns the layout that covers `length` tokens with the least padding."""
  chunk = min(chunk, length)
  chunks = -(-length // chunk)
  groups = -(-chunks // chunks_per_group)
  return Layout(chunk, -(-chunks // groups), groups)


def pad_time(x: jax.Array | None, length: int, mode: str = 'constant'):
  """Pads axis 1 at its end to `length`, with zeros or its edge."""
  if x is None or x.shape[1] == length:
    return x
  widths = [(0, 0)] * x.ndim
  widths[1] = (0, length - x.shape[1])
  return jnp.pad(x, widths, mode=mode)


def zero_where_not(x: jax.Array, valid: jax.Array) -> jax.Array:
  """Returns x [B, T, ...], zero where valid [B, T] is false."""
  return jnp.where(jnp.expand_dims(valid, range(2, x.ndim)), x, 0)


def to_chunks(x: jax.Array, chunks: int, heads: int) -> jax.Array:
  """Returns [B, L, H, ...] as float32 [M, B, heads, C, ...], H repeated."""
  batch, length, own, *rest = x.shape
  x = x.reshape(batch, chunks, length // chunks, own, *rest)
  x = jnp.moveaxis(jnp.moveaxis(x, 3, 1), 2, 0)
  if own != heads:
    x = jnp.repeat(x, heads // own, axis=2)
  return x.astype(jnp.float32)


def from_chunks(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns [M, B, HV, C, ...] as [B, M C, H, ...].

  The H heads and the dtype are those of `like` [B, M C, H, ...]; groups of
  heads are summed.
  """
  chunks, batch, repeated, chunk, *rest = x.shape
  heads = like.shape[2]
  if repeated != heads:
    x = x.reshape(chunks, batch, heads, repeated // heads, chunk, *rest).sum(3)
  x = jnp.moveaxis(jnp.moveaxis(x, 0, 2), 1, 3)
  return x.reshape(batch, chunks * chunk, heads, *rest).astype(like.dtype)


def _part(x, n, groups):
  size = x.shape[1] // groups
  return jax.lax.dynamic_slice_in_dim(x, n * size, size, axis=1)


def _join(x):
  """Returns groups [N, B, L, ...] as one time axis [B, N L, ...]."""
  groups, batch, length, *rest = x.shape
  return jnp.moveaxis(x, 0, 1).reshape(batch, groups * length, *rest)


def scan_groups(
  step: Callable[[Any, Any, Any], tuple[Any, Any, Any]],
  state: Any,
  inputs: Any,
  saved: Any = None,
  *,
  groups: int,
  reverse: bool = False,
) -> tuple[Any, Any, Any]:
  """Scans over the groups of a time axis.

  The outputs are stacked, not carried from group to group: in a layer on a mesh
  whose `jax.checkpoint` saves all but gathered parameters, JAX would save what
  is carried after every group, the whole array each time.

  Args:
    step: (state, part of inputs, part of saved) -> (state, part of outputs,
      what to save).
    state: carried from group to group.
    inputs: tree of [B, T, ...]; `step` gets [B, T / groups, ...] of each.
    saved: tree of [groups, ...], what an earlier scan saved.
    groups: number of groups.
    reverse: take the groups from the last to the first.

  Returns:
    (state after all groups, outputs, saved with a leading axis of groups).
  """

  def body(state, xs):
    n, saved_n = xs
    parts = jax.tree.map(lambda x: _part(x, n, groups), inputs)
    state, made, keep = step(state, parts, saved_n)
    return state, (made, keep)

  state, (made, kept) = jax.lax.scan(
    body, state, (jnp.arange(groups), saved), reverse=reverse
  )
  return state, jax.tree.map(_join, made), kept


def scan_chunks(step, state, xs, *, reverse: bool = False):
  """Scans over the chunks of a group, unrolled."""
  chunks = jax.tree.leaves(xs)[0].shape[0]
  return jax.lax.scan(step, state, xs, reverse=reverse, unroll=chunks)


def precision_for(dtype) -> str:
  """Returns the matmul precision for inputs of a dtype.

  Products of 16-bit inputs are exact in TF32, those of float32 are not.
  """
  return 'highest' if dtype == jnp.float32 else 'default'


@jax.custom_vjp
def first_order_only(tree: Any) -> Any:
  """Returns `tree`, and refuses to be differentiated.

  A hand-written VJP calls it on what its two functions are given: JAX would
  differentiate them for a second derivative, which they are not made for.

  Raises:
    NotImplementedError: it is differentiated.
  """
  return tree


def _refuse(tree):
  del tree
  raise NotImplementedError(
    'chunkwise implementations have first derivatives in reverse mode only; '
    "for higher ones use implementation='recurrent'"
  )


first_order_only.defvjp(_refuse, _refuse)


def with_float64(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `function`, which may compute in float64 whatever the setting.

  JAX's own rules for vmap would forget the float64; here a vmapped axis becomes
  the second one of every array. So `function` must take any number of axes
  there, alike on all its arrays and results. It has no derivative.
  """

  @jax.custom_batching.custom_vmap
  def computed(*arguments):
    with jax.enable_x64(True):
      return function(*arguments)

  @computed.def_vmap
  def batched(size, is_batched, *arguments):
    arguments = jax.tree.map(
      lambda x, has: jnp.moveaxis(
        x if has else jnp.broadcast_to(x, (size, *x.shape)), 0, 1
      ),
      arguments,
      tuple(is_batched),
    )
    results = computed(*arguments)
    results = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), results)
    return results, jax.tree.map(lambda _: True, results)

  return computed


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `function` of float32 arrays, computed in float64 throughout.

  The arrays go in widened and the results come back rounded; float64 arrays
  (bool ones) go in, and come back, as they are. See `with_float64` for what
  `function` must take.
  """

  def compute(*arguments):
    is_float32 = lambda x: x.dtype == jnp.float32  # noqa: E731
    rounds = any(map(is_float32, jax.tree.leaves(arguments)))
    results = function(
      *jax.tree.map(
        lambda x: x.astype(jnp.float64) if is_float32(x) else x, arguments
      )
    )
    if not rounds:
      return results
    return jax.tree.map(lambda x: x.astype(jnp.float32), results)

  return with_float64(compute)


def transpose(x: jax.Array) -> jax.Array:
  """Returns x with its last two axes swapped, as an array of its own.

  Folded into a product, a transposed left operand takes XLA's CPU backend off
  its fast path (three times slower at chunk size); the barrier prevents that.
  """
  return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def sum_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns x summed over the axes that `shape` broadcasts to x's."""
  axes = [i for i, n in enumerate(shape) if n != x.shape[i]]
  return jnp.sum(x, axis=axes, keepdims=True)


@jax.custom_vjp
def outer(
  x: jax.Array, y: jax.Array, known: jax.Array | None = None
) -> jax.Array:
  """Returns x y^T over the last two axes: [..., I, K], [..., J, K] to I, J.

  Args:
    x: rows.
    y: columns.
    known: x y^T, where it has been computed, in any precision. The result is
      this in x's dtype; gradients go to x and y all the same.
  """
  if known is not None:
    return known.astype(x.dtype)
  return jnp.einsum('...ik,...jk->...ij', x, y)


def _outer_forward(x, y, known):
  return outer(x, y, known), (x, y)


def _outer_backward(residuals, d):
  x, y = residuals
  return d @ y, transpose(d) @ x, None


outer.defvjp(_outer_forward, _outer_backward)


@jax.custom_vjp
def gram(x: jax.Array, known: jax.Array | None = None) -> jax.Array:
  """Returns `outer(x, x, known)`, with one product in its gradient."""
  return outer(x, x, known)


def _gram_forward(x, known):
  return gram(x, known), x


def _gram_backward(x, d):
  return (d + transpose(d)) @ x, None


gram.defvjp(_gram_forward, _gram_backward)
