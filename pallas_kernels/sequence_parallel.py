"""Linear recurrences, and convolutions, over a time axis that is sharded.

An op with a state S in R^{K x V} per row and value head, whose step is
S_t = A_t S_{t-1} + W_t with A_t and W_t free of S, takes the state that enters
a part of the row to the state that leaves it by an affine map,

    S_out = M S_in + E,        M in R^{K x K}, E in R^{K x V},

with M the product of the A_t, be they reflections, decays or both. A run of the
op over the part, from the first state 0, leaves E; one with values of 0, from
the first state I, leaves M: no formula of the op is needed. Columns of V know
nothing of one another, so both are one run over V + K columns; what tokens read
in it is not looked at.
The map of a part is composed with that of the parts before it,

    (M_2, E_2) after (M_1, E_1)  =  (M_2 M_1, M_2 E_1 + E_2),

which is associative. So n devices find what all parts before theirs do
together in ceil(log2 n) rounds (Hillis and Steele, 1986): in the round r,
device d sends the composition of its last 2^r parts to device d + 2^r. The
row's first state is part of the first device's E, so the composed E is the
state that enters. From it the op runs over the part, V columns alone.

The gradient of the state goes from the last device to the first, by

    dS_in = M^T dS_out + G,

where G is what the part's own outputs give, the gradient of S_in by the op's
VJP with dS_out = 0. M is known, so the same rounds the other way round find
dS_out of every part, and the op's VJP with it all gradients: of M and E no
gradient is taken.

So the op runs twice over a part, and most of its VJP too. An implementation can
do with less if it takes an `Exchange`: called once, it asks that for the state
that enters and for dS_out when it needs them. It then finds E, M and G and no
more; or, as what tokens read is affine in the state that enters, o = o_0 + R
S_in, goes through the part once, with G = R^T do.

Segments: a reset inside a part leaves M = 0 by itself. A reset between two
parts (the last id that is not padding in one differs from the first in the
other) drops the M of the later one; parts of padding have M = I and no ids.

Exchanged per round and pass, by one collective-permute: K (K + V) float32
numbers per row and value head, and two ids per row where there are segments;
nothing grows with T. The final state is summed over the devices, once, with
zeros on all but the last, and so are its gradient and the first state's.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch

Axes = str | tuple[str, ...]

# `checkpoint_name` of the states that enter parts, and of the M of these: with
# them kept, nothing is exchanged, and no map found, a second time.
STATES = 'sequence_parallel_states'


class _Part(NamedTuple):
  """What a stretch of the row does to the state that enters it.

  The ids are 0 for padding alone, and None without segments. All zeros stand
  for the time before the row: nothing reaches a state from there. Gradients
  enter a stretch at its end, so that M is transposed and the ids change places.
  """

  affine: jax.Array  # [B, HV, K, V + K]: [E, M]
  first_id: jax.Array | None  # [B]
  last_id: jax.Array | None  # [B]


def _devices(axes):
  """Returns the mesh axes in the mesh's order, and every part's device there.

  `jax.lax.ppermute` counts in the mesh's order, parts go in that of `axes`.
  """
  axes = (axes,) if isinstance(axes, str) else axes
  names = jax.sharding.get_abstract_mesh().axis_names
  ordered = tuple(sorted(axes, key=names.index))
  numbers = np.arange(jax.lax.axis_size(ordered))
  numbers = numbers.reshape([jax.lax.axis_size(a) for a in ordered])
  numbers = numbers.transpose([ordered.index(a) for a in axes])
  return ordered, numbers.ravel().tolist()


def _shift(tree, distance, axes):
  """Returns what the device `distance` before holds, zeros if there is none.

  A negative distance counts the devices behind.
  """
  ordered, devices = _devices(axes)
  if distance < 0:
    devices = devices[::-1]
  pairs = list(zip(devices, devices[abs(distance) :], strict=False))
  return jax.lax.ppermute(tree, ordered, pairs)


def _unless_reset(left: _Part, right: _Part, x):
  """Returns x [B, HV, ...], zeros in rows with a reset between the parts."""
  if left.last_id is None:
    return x
  is_reset = (left.last_id != 0) & (right.first_id != 0)
  is_reset &= left.last_id != right.first_id
  return jnp.where(is_reset.reshape(-1, *(1,) * (x.ndim - 1)), 0, x)


def _compose(left: _Part, right: _Part) -> _Part:
  """Returns what `left`, then `right`, do together."""
  key_dim = right.affine.shape[-2]
  state, transition = jnp.split(
    right.affine, [right.affine.shape[-1] - key_dim], -1
  )
  transition = _unless_reset(left, right, transition)
  composed = jnp.matmul(
    transition, left.affine, precision=jax.lax.Precision.HIGHEST
  )
  composed += jnp.pad(state, [(0, 0)] * 3 + [(0, key_dim)])
  if left.last_id is None:
    return _Part(composed, None, None)
  return _Part(
    composed,
    jnp.where(left.first_id == 0, right.first_id, left.first_id),
    jnp.where(right.last_id == 0, left.last_id, right.last_id),
  )


def _before(part: _Part, axes: Axes, step: int = 1) -> _Part:
  """Returns the composition of the parts of all earlier devices.

  With the step -1 it is that of all later ones, from the last on.
  """
  before, distance = None, 1
  while distance < jax.lax.axis_size(axes):
    arrived = _shift(part, step * distance, axes)
    before = arrived if before is None else _compose(arrived, before)
    part = _compose(arrived, part)
    distance *= 2
  return before


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['ids'], meta_fields=['axes']
)
@dataclasses.dataclass(frozen=True)
class Exchange:
  """What the devices that share a row tell one another.

  Attributes:
    axes: the mesh axes over which the row is cut.
    ids: the part's first and last id [B] that are not 0; None without segments.
  """

  axes: Axes
  ids: tuple[jax.Array | None, jax.Array | None]

  def enter(self, affine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns what the parts before leave in the entering state, and M.

    Both are named `STATES`.

    Args:
      affine: float32 [B, HV, K, V + K], this part's [E, M].

    Returns:
      [B, HV, K, V] and [B, HV, K, K].
    """
    part = _Part(affine, *self.ids)
    before = _before(part, self.axes)
    value_dim = affine.shape[-1] - affine.shape[-2]
    entering = _unless_reset(before, part, before.affine[..., :value_dim])
    return checkpoint_name((entering, affine[..., value_dim:]), STATES)

  def leave(self, own: jax.Array, transition: jax.Array) -> jax.Array:
    """Returns what the parts behind add to the leaving state's gradient.

    Args:
      own: [B, HV, K, V], the entering state's gradient as this part knows it.
      transition: M, as it came from `enter`.

    Returns:
      [B, HV, K, V].
    """
    first_id, last_id = self.ids
    back = jnp.concatenate([own, jnp.swapaxes(transition, -1, -2)], axis=-1)
    part = _Part(back, first_id=last_id, last_id=first_id)
    after = _before(part, self.axes, step=-1)
    return _unless_reset(after, part, after.affine[..., : own.shape[-1]])


# An implementation that knows of no other devices, of arrays by name.
_Recurrence = Callable[..., tuple[jax.Array, jax.Array]]


def _affine(recurrence: _Recurrence, arrays):
  """Returns [E, M] of a part, with E from its first state."""
  v, first_state = arrays['v'], arrays['initial_state']
  *rows, key_dim, _ = first_state.shape  # [B, HV, K, V]
  eye = jnp.eye(key_dim, dtype=first_state.dtype)
  eye = jnp.broadcast_to(eye, (*rows, key_dim, key_dim))
  changed = {
    'v': jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, key_dim)]),
    'initial_state': jnp.concatenate([first_state, eye], axis=-1),
  }
  return recurrence(**arrays | changed)[1]


def _enter(recurrence: _Recurrence, inputs, segment_ids, exchange: Exchange):
  """Returns the op of a part, its inputs with the state that enters, and M.

  The op takes the inputs alone.
  """
  arrays = inputs | {'segment_ids': segment_ids}
  entering, transition = exchange.enter(_affine(recurrence, arrays))
  state = inputs['initial_state'] + entering

  def op(inputs):
    return recurrence(**inputs, segment_ids=segment_ids)

  return op, inputs | {'initial_state': state}, transition


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(recurrence: _Recurrence, inputs, segment_ids, exchange: Exchange):
  op, inputs, _ = _enter(recurrence, inputs, segment_ids, exchange)
  return op(inputs)


def _forward(recurrence: _Recurrence, inputs, segment_ids, exchange: Exchange):
  op, inputs, transition = _enter(recurrence, inputs, segment_ids, exchange)
  results, pullback = jax.vjp(op, inputs)
  return results, (pullback, transition, exchange)


def _backward(recurrence: _Recurrence, residuals, cotangents):
  del recurrence
  pullback, transition, exchange = residuals
  do, dstate = cotangents
  own = pullback((do, dstate))[0]['initial_state']
  dstate += exchange.leave(own, transition)
  (gradients,) = pullback((do, dstate))
  return gradients, None, None


_run.defvjp(_forward, _backward)


def _outer_ids(segment_ids):
  """Returns the first and the last id [B] that are not 0, or 0."""

  def first(ids):
    index = jnp.argmax(ids != 0, axis=1, keepdims=True)
    return jnp.take_along_axis(ids, index, axis=1)[:, 0]

  return first(segment_ids), first(segment_ids[:, ::-1])


def _of_part(op: dispatch.Op, choice, settings, arrays, axes):
  if axes is None:
    return op(choice, **arrays, **settings)
  segment_ids, index = arrays['segment_ids'], jax.lax.axis_index(axes)
  ids = (None, None) if segment_ids is None else _outer_ids(segment_ids)
  exchange = Exchange(axes, ids)
  inputs = {n: x for n, x in arrays.items() if n != 'segment_ids'}
  inputs['initial_state'] = jnp.where(index == 0, inputs['initial_state'], 0)

  def run(implementation: dispatch.Implementation):
    function = functools.partial(implementation.function, **settings)
    if implementation.exchanges:
      return function(**inputs, segment_ids=segment_ids, exchange=exchange)
    return _run(function, inputs, segment_ids, exchange)

  o, state = op.first(choice, run)
  last = jnp.where(index == jax.lax.axis_size(axes) - 1, state, 0)
  return o, jax.lax.psum(last, axes)


def linear_recurrence(op: dispatch.Op, choice: dispatch.Choice, **settings):
  """Returns the body of `sharded_call.sharded_call` for a linear recurrence.

  Args:
    op: called with the choice, the settings and the arrays by name, among them
      `v` [B, T, ..., V], `initial_state` [B, HV, K, V] and `segment_ids` [B, T]
      or None; returns (o [B, T, HV, V], final_state). Both are linear in the
      first state and v, column by column; 0 in `segment_ids` is padding, other
      changes reset the state.
    choice: of the op's implementation.
    **settings: what else the op is called with.

  Returns:
    body(arrays, axes) -> (o, final_state): the op over the row whose parts
    `arrays` are, one part per device along the mesh axes `axes`, in their
    order; `axes` None: the row is whole.
  """
  return functools.partial(_of_part, op, choice, settings)


def halo(x: jax.Array, size: int, axes: Axes) -> jax.Array:
  """Returns the tokens before this device's part of the row.

  For a convolution over W tokens, `size` is W - 1. Exchanges `size` tokens, by
  one collective-permute where a part is at least as long.

  Args:
    x: [B, T, ...], the device's part: tokens, or segment ids.
    size: how many tokens, at least 1.
    axes: the mesh axes over which T is sharded.

  Returns:
    [B, size, ...], the last `size` tokens of the devices before, zeros before
    the row.
  """
  length = x.shape[1]
  pieces = []
  for distance in range(1, -(-size // length) + 1):
    count = min(length, size - (distance - 1) * length)
    pieces.append(_shift(x[:, length - count :], distance, axes))
  return jnp.concatenate(pieces[::-1], axis=1)
