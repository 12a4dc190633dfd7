"""The diagonal-plus-low-rank recurrence: functions, checks and dispatch."""

import jax
import jax.numpy as jnp

from pallas_kernels import argument_checks
from pallas_kernels import dispatch
from pallas_kernels import sequence_parallel
from pallas_kernels import shapes
from pallas_kernels import sharded_call
from pallas_kernels.diagonal_plus_low_rank import chunked_xla
from pallas_kernels.diagonal_plus_low_rank import reference

DIAGONAL_PLUS_LOW_RANK = dispatch.Op(
  'diagonal_plus_low_rank',
  (
    dispatch.Implementation(
      name='xla', function=chunked_xla.diagonal_plus_low_rank
    ),
    dispatch.Implementation(
      name='recurrent', function=reference.diagonal_plus_low_rank
    ),
  ),
)

_STATE = 'B HV K V'


def _check_token(leading: str, q, k, v, a, b, g) -> dict[str, int]:
  """Checks the arrays of tokens and returns the sizes of their axes."""
  keys, gates = f'{leading} H K', f'{leading} HV'
  gate = {}
  if g is not None:
    per_channel = g.ndim > len(gates.split())
    gate = {'g': (g, f'{gates} K' if per_channel else gates)}
  sizes = shapes.check_shapes(
    q=(q, keys),
    k=(k, keys),
    v=(v, f'{gates} V'),
    a=(a, keys),
    b=(b, keys),
    **gate,
  )
  shared = {'q': q, 'k': k, 'v': v, 'a': a, 'b': b}
  argument_checks.check_dtypes(shared, g=g)
  return sizes


def diagonal_plus_low_rank(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  a: jax.Array,
  b: jax.Array,
  g: jax.Array | None = None,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk_size: int | None = None,
  implementation: dispatch.Choice = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes a recurrence whose transition is diagonal plus of rank one.

  Per row and head, with the state S in R^{K x V} and S_0 = initial_state,

      S_t = (Diag(exp(g_t)) + a_t b_t^T) S_{t-1} + k_t v_t^T
      o_t = scale * S_t^T q_t.

  It is RWKV-7's (Peng et al., "RWKV-7 Goose with Expressive Dynamic State
  Evolution", 2025), with b the removal key, a minus it times the in-context
  learning rate. It is the delta rule for a = -beta k, b = k, g=None, with
  beta k in the place of k; `delta_rule` does that faster and more accurately.

  Nothing bounds the transition: keep its norm at most 1, as |a_t| |b_t| <= 2
  with a_t a negative multiple of b_t and g=None does, or S grows with T.

  Sums are taken in float32. In its default chunks every result of `xla` is
  within twice the rms error of `recurrent` plus 2 ulp, except for K at most 2,
  where what vanishes along the sequence, as the gradient of the initial state
  may, is a few times less accurate. Differentiable in every array argument and
  through both results; cotangents have the dtype of their primal.

  Under a mesh (`jax.set_mesh`) the op shards itself, see `sharded_call`: rows
  and heads with no communication, time by exchanging states, see
  `sequence_parallel`.

  Args:
    q: queries [B, T, H, K], float32 or bfloat16, T >= 1.
    k: keys [B, T, H, K].
    v: values [B, T, HV, V]; HV is a multiple of H, and the key head h serves
      the value heads h HV/H to (h + 1) HV/H - 1.
    a: where what b reads is written to [B, T, H, K].
    b: what is read of the state before the token [B, T, H, K].
    g: natural logarithm of the decay, at most 0: None (no decay), [B, T, HV]
      or [B, T, HV, K].
    scale: factor of the output; None means K^-0.5.
    initial_state: float32 [B, HV, K, V]; None means zeros.
    segment_ids: int32 [B, T]. Tokens with id 0 are padding: their output is 0
      and they touch no state. The state is reset to zero at a token whose id
      differs from that of the last token before it that is not padding;
      `initial_state` enters the row's first segment.
    chunk_size: tokens per chunk of the chunkwise implementations; None means
      the implementation's choice.
    implementation: None (automatic), a name, or names in the order to try:
      `recurrent` (a scan over tokens) or `xla` (chunkwise).

  Returns:
    o: outputs [B, T, HV, V] in v's dtype.
    final_state: float32 [B, HV, K, V], the state after the last token.

  Raises:
    ValueError: shapes, dtypes or an option break a rule above.
    NotImplementedError: no implementation asked for covers the arguments.
  """
  sizes = _check_token('B T', q, k, v, a, b, g)
  argument_checks.check_sizes(sizes, chunk_size)
  argument_checks.check_segment_ids(segment_ids, sizes)
  dtype = argument_checks.state_dtype(q)
  if initial_state is None:
    shape = tuple(sizes[axis] for axis in _STATE.split())
    initial_state = jnp.zeros(shape, dtype)
  argument_checks.check_state(
    'initial_state', initial_state, _STATE, sizes, dtype
  )
  body = sequence_parallel.linear_recurrence(
    DIAGONAL_PLUS_LOW_RANK,
    implementation,
    scale=sizes['K'] ** -0.5 if scale is None else scale,
    chunk_size=chunk_size,
  )
  return sharded_call.sharded_call(
    body,
    {
      'q': (q, 'B T H K'),
      'k': (k, 'B T H K'),
      'v': (v, 'B T HV V'),
      'a': (a, 'B T H K'),
      'b': (b, 'B T H K'),
      'g': (g, 'B T HV K'),
      'initial_state': (initial_state, _STATE),
      'segment_ids': (segment_ids, 'B T'),
    },
    results=('B T HV V', _STATE),
  )


def diagonal_plus_low_rank_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  a: jax.Array,
  b: jax.Array,
  g: jax.Array | None = None,
  *,
  state: jax.Array,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Advances the recurrence by one token, for decoding.

  The equation is `diagonal_plus_low_rank`'s.

  Args:
    q: query [B, H, K].
    k: key [B, H, K].
    v: value [B, HV, V].
    a: where what b reads is written to [B, H, K].
    b: what is read of the state [B, H, K].
    g: log-decay: None, [B, HV] or [B, HV, K].
    state: float32 [B, HV, K, V].
    scale: factor of the output; None means K^-0.5.

  Returns:
    o: output [B, HV, V] in v's dtype.
    state: float32 [B, HV, K, V].

  Raises:
    ValueError: shapes or dtypes do not fit.
  """
  sizes = _check_token('B', q, k, v, a, b, g)
  argument_checks.check_sizes(sizes)
  dtype = argument_checks.state_dtype(q)
  argument_checks.check_state('state', state, _STATE, sizes, dtype)
  scale = sizes['K'] ** -0.5 if scale is None else scale
  return reference.diagonal_plus_low_rank_step(
    q, k, v, a, b, g, state=state, scale=scale
  )
