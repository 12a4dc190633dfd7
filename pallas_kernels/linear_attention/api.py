"""Linear attention: public functions, checks and dispatch."""

import jax
import jax.numpy as jnp

from pallas_kernels import argument_checks
from pallas_kernels import dispatch
from pallas_kernels import sequence_parallel
from pallas_kernels import shapes
from pallas_kernels import sharded_call
from pallas_kernels.linear_attention import chunked_xla
from pallas_kernels.linear_attention import reference

LINEAR_ATTENTION = dispatch.Op(
  'linear_attention',
  (
    dispatch.Implementation(name='xla', function=chunked_xla.linear_attention),
    dispatch.Implementation(
      name='recurrent', function=reference.linear_attention
    ),
  ),
)


def _gate_axes(g, bonus, leading: str) -> dict:
  axes = {}
  if g is not None:
    per_channel = g.ndim > len(leading.split())
    named = f'{leading} K' if per_channel else leading
    axes['g'] = (g, 'HV' if g.ndim == 1 else named)
  if bonus is not None:
    axes['bonus'] = (bonus, 'HV K')
  return axes


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None = None,
  bonus: jax.Array | None = None,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  chunk_size: int | None = None,
  implementation: dispatch.Choice = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes linear attention with decay over a sequence.

  Per row and head, with the state S in R^{K x V} and S_0 = initial_state,

      S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T
      o_t = scale * S_t^T q_t,

  and, with a bonus u, which reads before the token's own decay and write,

      o_t = scale * (S_{t-1} + Diag(u) k_t v_t^T)^T q_t.

  Models by their arguments (table 4 of Yang et al., "Parallelizing Linear
  Transformers with the Delta Rule over Sequence Length", 2024, there with
  transposed states and scale 1), with phi a feature map and z from
  `linear_attention_with_normalizer`:

      model             q, k, v                g                  read-out
      linear attention  phi(q), phi(k), v      None               o, or o / z
      RetNet            q, k, v (rotated)      [HV], constant     o
      Mamba-2           C, B, dt x             dt A: [B,T,HV]     o
      Gated RFA         q, (1 - exp(g)) k, v   [B,T,HV]           o / z
      mLSTM             `stabilized_gates` and its docstring
      GLA               q, k, v                [B,T,HV,K]         o
      HGRN-2            q, 1 - exp(g), v       [B,T,HV,K]         o
      RWKV-6            r, k, v, bonus u       [B,T,HV,K]         o

  The bonus lies on the key dimension as in RWKV-6 itself (Peng et al., "Eagle
  and Finch", 2024); that table prints it on the values.

  Sums are taken in float32. Decays are never clipped: 0, -20 and -1000 per
  token are computed as what they are. Differentiable in every array argument
  and through both results; cotangents have the dtype of their primal.

  Args:
    q: queries [B, T, H, K], float32 or bfloat16, T >= 1.
    k: keys [B, T, H, K].
    v: values [B, T, HV, V]; HV is a multiple of H, and the key head h serves
      the value heads h HV/H to (h + 1) HV/H - 1.
    g: natural logarithm of the decay, finite and at most 0: None, [HV] (the
      same at all tokens), [B, T, HV] or [B, T, HV, K].
    bonus: u [HV, K], or None.
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
  sizes = shapes.check_shapes(
    q=(q, 'B T H K'),
    k=(k, 'B T H K'),
    v=(v, 'B T HV V'),
    **_gate_axes(g, bonus, 'B T HV'),
  )
  argument_checks.check_dtypes({'q': q, 'k': k, 'v': v}, g=g, bonus=bonus)
  argument_checks.check_sizes(sizes, chunk_size)
  argument_checks.check_segment_ids(segment_ids, sizes)
  dtype = argument_checks.state_dtype(q)
  argument_checks.check_state(
    'initial_state', initial_state, 'B HV K V', sizes, dtype
  )
  if initial_state is None:
    shape = tuple(sizes[axis] for axis in ('B', 'HV', 'K', 'V'))
    initial_state = jnp.zeros(shape, dtype)
  if g is not None and g.ndim == 1:
    g = jnp.broadcast_to(g[None, None], v.shape[:3])
  body = sequence_parallel.linear_recurrence(
    LINEAR_ATTENTION,
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
      'g': (g, 'B T HV K'),
      'bonus': (bonus, 'HV K'),
      'initial_state': (initial_state, 'B HV K V'),
      'segment_ids': (segment_ids, 'B T'),
    },
    results=('B T HV V', 'B HV K V'),
  )


def linear_attention_with_normalizer(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None = None,
  *,
  scale: float | None = None,
  initial_state: tuple[jax.Array, jax.Array] | None = None,
  segment_ids: jax.Array | None = None,
  chunk_size: int | None = None,
  implementation: dispatch.Choice = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
  """Computes linear attention and the weights that its output sums to.

  Beside o and S of `linear_attention`, with n_0 in R^K,

      n_t = exp(g_t) n_{t-1} + k_t        z_t = scale * n_t^T q_t,

  the recurrence for a value of 1, and computed as that: as one more column of
  v. What divides o is the caller's: z (linear attention, Gated RFA),
  max(|z|, exp(-m)) (mLSTM). At padding z is 0, like o.

  Args:
    q: as in `linear_attention`, and so on.
    k: keys.
    v: values.
    g: log-decays.
    scale: factor of o and z.
    initial_state: float32 (S [B, HV, K, V], n [B, HV, K]); None means zeros.
    segment_ids: resets n as it resets S.
    chunk_size: tokens per chunk.
    implementation: which one runs.

  Returns:
    o: outputs [B, T, HV, V] in v's dtype, not divided.
    z: [B, T, HV] in v's dtype.
    final_state: (S, n) after the last token.

  Raises:
    ValueError: shapes, dtypes or an option break a rule above.
    NotImplementedError: no implementation asked for covers the arguments.
  """
  if initial_state is not None:
    state, normalizer = initial_state
    shapes.check_shapes(
      initial_state=(state, 'B HV K V'), normalizer=(normalizer, 'B HV K')
    )
    initial_state = jnp.concatenate([state, normalizer[..., None]], axis=-1)
  ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
  o, state = linear_attention(
    q,
    k,
    jnp.concatenate([v, ones], axis=-1),
    g,
    scale=scale,
    initial_state=initial_state,
    segment_ids=segment_ids,
    chunk_size=chunk_size,
    implementation=implementation,
  )
  return o[..., :-1], o[..., -1], (state[..., :-1], state[..., -1])


def linear_attention_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array | None = None,
  bonus: jax.Array | None = None,
  *,
  state: jax.Array,
  scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Advances linear attention by one token, for decoding.

  The equation is `linear_attention`'s.

  Args:
    q: query [B, H, K].
    k: key [B, H, K].
    v: value [B, HV, V].
    g: log-decay: None, [HV], [B, HV] or [B, HV, K].
    bonus: u [HV, K], or None.
    state: float32 [B, HV, K, V].
    scale: factor of the output; None means K^-0.5.

  Returns:
    o: output [B, HV, V] in v's dtype.
    state: float32 [B, HV, K, V].

  Raises:
    ValueError: shapes or dtypes do not fit.
  """
  sizes = shapes.check_shapes(
    q=(q, 'B H K'),
    k=(k, 'B H K'),
    v=(v, 'B HV V'),
    **_gate_axes(g, bonus, 'B HV'),
  )
  argument_checks.check_dtypes({'q': q, 'k': k, 'v': v}, g=g, bonus=bonus)
  argument_checks.check_sizes(sizes)
  dtype = argument_checks.state_dtype(q)
  argument_checks.check_state('state', state, 'B HV K V', sizes, dtype)
  if g is not None and g.ndim == 1:
    g = jnp.broadcast_to(g[None], v.shape[:2])
  return reference.linear_attention_step(
    q,
    k,
    v,
    g,
    bonus,
    state=state,
    scale=sizes['K'] ** -0.5 if scale is None else scale,
  )
