"""The delta rule: public functions, checks and dispatch."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import shapes
from pallas_kernels.delta_rule import chunked_xla
from pallas_kernels.delta_rule import reference

DELTA_RULE = dispatch.Op(
  'delta_rule',
  (
    dispatch.Implementation(name='xla', function=chunked_xla.delta_rule),
    dispatch.Implementation(name='recurrent', function=reference.delta_rule),
  ),
)

_DTYPES = ('float32', 'bfloat16', 'float64')
_NORM_EPS = 1e-6


def _check_dtypes(q, k, v, beta, g):
  if not (q.dtype == k.dtype == v.dtype) or q.dtype.name not in _DTYPES:
    raise ValueError(
      f'q, k, v must share one dtype of {", ".join(_DTYPES)}, got '
      f'{q.dtype}, {k.dtype}, {v.dtype}'
    )
  for name, array in (('beta', beta), ('g', g)):
    if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f'{name} must be of a float dtype, got {array.dtype}')


def _check_heads(sizes):
  if sizes['HV'] % sizes['H']:
    raise ValueError(
      'the value heads HV must be a multiple of the key heads H, got '
      f'HV={sizes["HV"]} and H={sizes["H"]}'
    )


def _gate_axes(g, leading: str) -> dict:
  if g is None:
    return {}
  per_channel = g.ndim == len(leading.split()) + 1
  return {'g': (g, f'{leading} K' if per_channel else leading)}


def _check_state(name, state, sizes, dtype):
  if state is None:
    return
  expected = tuple(sizes[axis] for axis in ('B', 'HV', 'K', 'V'))
  if state.shape != expected or state.dtype != dtype:
    raise ValueError(
      f'{name} must be {dtype.name} of shape [B, HV, K, V] = {expected}, got '
      f'{state.dtype} of shape {tuple(state.shape)}'
    )


def _state_dtype(q):
  return q.dtype if q.dtype == jnp.float64 else jnp.dtype(jnp.float32)


def _l2_normalize(x):
  """Returns x / sqrt(sum(x^2) + 1e-6) over the last axis, in x's dtype."""
  y = x.astype(_state_dtype(x))
  norm = jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + _NORM_EPS)
  return (y * norm).astype(x.dtype)


def delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array | None = None,
  *,
  scale: float | None = None,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  normalize_qk: bool = False,
  chunk_size: int | None = None,
  implementation: dispatch.Choice = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes the delta rule over a sequence.

  Per row and head, with the state S in R^{K x V} and S_0 = initial_state,

      S'_t = Diag(exp(g_t)) S_{t-1}
      S_t  = S'_t + k_t (beta_t (v_t - S'_t^T k_t))^T
      o_t  = scale * S_t^T q_t,

  which for g=None is S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,
  equations 1 to 4 of Yang et al., "Parallelizing Linear Transformers with the
  Delta Rule over Sequence Length", 2024 (there transposed, with scale 1). The
  recurrence neither grows nor oscillates without bound while
  0 <= beta_t |k_t|^2 <= 2.

  Sums are taken in float32. `xla` in float32 rounds the products of keys before
  it solves with them, which adds up over a chunk. In its default chunks every
  result is within twice the rms error of `recurrent` plus 2 ulp, except
    where keys are nearly parallel (cosine about 0.9 or more) and beta is near
    2: up to 6 times the error of `recurrent`, below 1e-5 of the result (in
    chunks of 64: up to 11 times and 1.3e-5), and
    for K = 1, where the gradient of the initial state cancels (1.2e-5).

  Differentiable in every array argument and through both results; cotangents
  have the dtype of their primal.

  Args:
    q: queries [B, T, H, K], float32 or bfloat16, T >= 1.
    k: keys [B, T, H, K].
    v: values [B, T, HV, V]; HV is a multiple of H, and the key head h serves
      the value heads h HV/H to (h + 1) HV/H - 1.
    beta: write strengths [B, T, HV], in [0, 2].
    g: natural logarithm of the decay, at most 0: None (no decay), [B, T, HV]
      or [B, T, HV, K].
    scale: factor of the output; None means K^-0.5.
    initial_state: float32 [B, HV, K, V]; None means zeros.
    segment_ids: int32 [B, T]. Tokens with id 0 are padding: their output is 0
      and they touch no state. The state is reset to zero at a token whose id
      differs from that of the last token before it that is not padding;
      `initial_state` enters the row's first segment.
    normalize_qk: divide q and k by their norm, sqrt(sum(x^2) + 1e-6), first.
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
    beta=(beta, 'B T HV'),
    **_gate_axes(g, 'B T HV'),
  )
  _check_dtypes(q, k, v, beta, g)
  _check_heads(sizes)
  if sizes['T'] < 1:
    raise ValueError(f'T must be at least 1, got q of shape {q.shape}')
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f'chunk_size must be at least 1, got {chunk_size}')
  if segment_ids is not None:
    shapes.check_shapes(q=(q, 'B T H K'), segment_ids=(segment_ids, 'B T'))
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
      raise ValueError(
        f'segment_ids must be of an integer dtype, got {segment_ids.dtype}'
      )
  dtype = _state_dtype(q)
  _check_state('initial_state', initial_state, sizes, dtype)
  if initial_state is None:
    shape = tuple(sizes[axis] for axis in ('B', 'HV', 'K', 'V'))
    initial_state = jnp.zeros(shape, dtype)
  if normalize_qk:
    q, k = _l2_normalize(q), _l2_normalize(k)
  return DELTA_RULE(
    implementation,
    q,
    k,
    v,
    beta,
    g,
    scale=sizes['K'] ** -0.5 if scale is None else scale,
    initial_state=initial_state,
    segment_ids=segment_ids,
    chunk_size=chunk_size,
  )


def delta_rule_step(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  beta: jax.Array,
  g: jax.Array | None = None,
  *,
  state: jax.Array,
  scale: float | None = None,
  normalize_qk: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Advances the delta rule by one token, for decoding.

  The equation is `delta_rule`'s.

  Args:
    q: query [B, H, K].
    k: key [B, H, K].
    v: value [B, HV, V].
    beta: write strength [B, HV].
    g: log-decay: None, [B, HV] or [B, HV, K].
    state: float32 [B, HV, K, V].
    scale: factor of the output; None means K^-0.5.
    normalize_qk: as in `delta_rule`.

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
    beta=(beta, 'B HV'),
    **_gate_axes(g, 'B HV'),
  )
  _check_dtypes(q, k, v, beta, g)
  _check_heads(sizes)
  _check_state('state', state, sizes, _state_dtype(q))
  if normalize_qk:
    q, k = _l2_normalize(q), _l2_normalize(k)
  scale = sizes['K'] ** -0.5 if scale is None else scale
  return reference.delta_rule_step(q, k, v, beta, g, state=state, scale=scale)
