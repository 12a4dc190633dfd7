"""The delta rule: public functions, checks and dispatch."""

import jax
import jax.numpy as jnp

from pallas_kernels import argument_checks
from pallas_kernels import dispatch
from pallas_kernels import normalization
from pallas_kernels import sequence_parallel
from pallas_kernels import shapes
from pallas_kernels import sharded_call
from pallas_kernels.delta_rule import chunked_xla
from pallas_kernels.delta_rule import mosaic_gpu
from pallas_kernels.delta_rule import reference


def _after_normalizing(function):
  """Returns an implementation that has q and k normalised for it."""

  def run(q, k, *args, normalize_qk, **kwargs):
    if normalize_qk:
      q, k = normalization.l2_normalize(q), normalization.l2_normalize(k)
    return function(q, k, *args, **kwargs)

  return run


DELTA_RULE = dispatch.Op(
  'delta_rule',
  (
    dispatch.Implementation(
      name='mosaic_gpu',
      function=mosaic_gpu.delta_rule,
      unavailable=mosaic_gpu.unavailable,
      exchanges=True,
    ),
    dispatch.Implementation(
      name='xla',
      function=_after_normalizing(chunked_xla.delta_rule),
      exchanges=True,
    ),
    dispatch.Implementation(
      name='recurrent', function=_after_normalizing(reference.delta_rule)
    ),
  ),
)


def gate_axes(g: jax.Array | None, leading: str) -> dict:
  """Returns g as an argument of `shapes.check_shapes`, if it is given."""
  if g is None:
    return {}
  per_channel = g.ndim == len(leading.split()) + 1
  return {'g': (g, f'{leading} K' if per_channel else leading)}


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

  Sums are taken in float32; `xla` inverts its chunks' triangular matrices in
  float64 where the inputs are float32, so that it stays within twice the rms
  error of `recurrent` plus 2 ulp for parallel keys and beta up to 2 as well.

  Differentiable in every array argument and through both results; cotangents
  have the dtype of their primal.

  Under a mesh (`jax.set_mesh`) the op shards itself, see `sharded_call`: rows
  and heads with no communication; time, over a mesh axis named `sequence` or as
  q is sharded in an Explicit mesh, by exchanging K (K + V) numbers per row and
  value head in log2(devices) rounds, see `sequence_parallel`.

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
    normalize_qk: divide q and k by their norm, sqrt(sum(x^2) + 1e-6), first;
      `mosaic_gpu` does so within its kernels.
    chunk_size: tokens per chunk of the chunkwise implementations; None means
      the implementation's choice.
    implementation: None (automatic), a name, or names in the order to try:
      `recurrent` (a scan over tokens), `xla` (chunkwise) or `mosaic_gpu`
      (chunkwise, Hopper GPUs: bfloat16, K and V of 64 or 128, g per head).

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
    **gate_axes(g, 'B T HV'),
  )
  argument_checks.check_dtypes({'q': q, 'k': k, 'v': v}, beta=beta, g=g)
  argument_checks.check_sizes(sizes, chunk_size)
  argument_checks.check_segment_ids(segment_ids, sizes)
  dtype = argument_checks.state_dtype(q)
  argument_checks.check_state(
    'initial_state', initial_state, 'B HV K V', sizes, dtype
  )
  if initial_state is None:
    shape = tuple(sizes[axis] for axis in ('B', 'HV', 'K', 'V'))
    initial_state = jnp.zeros(shape, dtype)
  body = sequence_parallel.linear_recurrence(
    DELTA_RULE,
    implementation,
    scale=sizes['K'] ** -0.5 if scale is None else scale,
    normalize_qk=normalize_qk,
    chunk_size=chunk_size,
  )
  return sharded_call.sharded_call(
    body,
    {
      'q': (q, 'B T H K'),
      'k': (k, 'B T H K'),
      'v': (v, 'B T HV V'),
      'beta': (beta, 'B T HV'),
      'g': (g, 'B T HV K'),
      'initial_state': (initial_state, 'B HV K V'),
      'segment_ids': (segment_ids, 'B T'),
    },
    results=('B T HV V', 'B HV K V'),
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
    **gate_axes(g, 'B HV'),
  )
  argument_checks.check_dtypes({'q': q, 'k': k, 'v': v}, beta=beta, g=g)
  argument_checks.check_sizes(sizes)
  dtype = argument_checks.state_dtype(q)
  argument_checks.check_state('state', state, 'B HV K V', sizes, dtype)
  if normalize_qk:
    q, k = normalization.l2_normalize(q), normalization.l2_normalize(k)
  scale = sizes['K'] ** -0.5 if scale is None else scale
  return reference.delta_rule_step(q, k, v, beta, g, state=state, scale=scale)
