"""The delta product, several delta rules per token: public functions."""

import jax
import jax.numpy as jnp

from pallas_kernels import argument_checks
from pallas_kernels import dispatch
from pallas_kernels import normalization
from pallas_kernels import sequence_parallel
from pallas_kernels import shapes
from pallas_kernels import sharded_call
from pallas_kernels.delta_rule import api
from pallas_kernels.delta_rule import chunked_xla
from pallas_kernels.delta_rule import reference

DELTA_PRODUCT = dispatch.Op(
  'delta_product',
  (
    dispatch.Implementation(
      name='xla',
      function=chunked_xla.delta_product,
      exchanges=True,
    ),
    dispatch.Implementation(name='recurrent', function=reference.delta_product),
  ),
)


def delta_product(
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
  """Computes n delta rules per token over a sequence.

  Per row and head, with S_{t,0} = Diag(exp(g_t)) S_{t-1} and j = 1 .. n,

      u_{t,j} = beta_{t,j} (v_{t,j} - S_{t,j-1}^T k_{t,j})
      S_{t,j} = S_{t,j-1} + k_{t,j} u_{t,j}^T,    S_t = S_{t,n}
      o_t     = scale * S_t^T q_t:

  the state is multiplied by a product of n generalised Householder matrices per
  token and read once (Siems et al., "DeltaProduct", 2025). For n = 1 it is
  `delta_rule`; q and the gradient of o are never widened to n T tokens.

  Args:
    q: queries [B, T, H, K], float32 or bfloat16, T >= 1.
    k: keys [B, T, N, H, K], N >= 1 per token, applied in order.
    v: values [B, T, N, HV, V]; HV is a multiple of H.
    beta: write strengths [B, T, N, HV], in [0, 2].
    g: natural logarithm of the decay of a token, at most 0: None, [B, T, HV] or
      [B, T, HV, K] (`recurrent` only).
    scale: factor of the output; None means K^-0.5.
    initial_state: float32 [B, HV, K, V]; None means zeros.
    segment_ids: as in `delta_rule`.
    normalize_qk: as in `delta_rule`.
    chunk_size: keys per chunk of the chunkwise implementations, rounded down to
      whole tokens; None means the implementation's choice.
    implementation: as in `delta_rule`.

  Returns:
    o: outputs [B, T, HV, V] in v's dtype.
    final_state: float32 [B, HV, K, V], the state after the last token.

  Raises:
    ValueError: shapes, dtypes or an option break a rule above.
    NotImplementedError: no implementation asked for covers the arguments.
  """
  sizes = shapes.check_shapes(
    q=(q, 'B T H K'),
    k=(k, 'B T N H K'),
    v=(v, 'B T N HV V'),
    beta=(beta, 'B T N HV'),
    **api.gate_axes(g, 'B T HV'),
  )
  argument_checks.check_dtypes({'q': q, 'k': k, 'v': v}, beta=beta, g=g)
  argument_checks.check_sizes(sizes, chunk_size)
  argument_checks.check_segment_ids(segment_ids, sizes)
  if sizes['N'] < 1:
    raise ValueError(f'N must be at least 1, got k of shape {k.shape}')
  dtype = argument_checks.state_dtype(q)
  argument_checks.check_state(
    'initial_state', initial_state, 'B HV K V', sizes, dtype
  )
  if initial_state is None:
    shape = tuple(sizes[axis] for axis in ('B', 'HV', 'K', 'V'))
    initial_state = jnp.zeros(shape, dtype)
  if normalize_qk:
    q, k = normalization.l2_normalize(q), normalization.l2_normalize(k)
  body = sequence_parallel.linear_recurrence(
    DELTA_PRODUCT,
    implementation,
    scale=sizes['K'] ** -0.5 if scale is None else scale,
    chunk_size=chunk_size,
  )
  return sharded_call.sharded_call(
    body,
    {
      'q': (q, 'B T H K'),
      'k': (k, 'B T N H K'),
      'v': (v, 'B T N HV V'),
      'beta': (beta, 'B T N HV'),
      'g': (g, 'B T HV K'),
      'initial_state': (initial_state, 'B HV K V'),
      'segment_ids': (segment_ids, 'B T'),
    },
    results=('B T HV V', 'B HV K V'),
  )


def delta_product_step(
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
  """Advances the delta product by one token, for decoding.

  The equation is `delta_product`'s.

  Args:
    q: query [B, H, K].
    k: keys [B, N, H, K].
    v: values [B, N, HV, V].
    beta: write strengths [B, N, HV].
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
    k=(k, 'B N H K'),
    v=(v, 'B N HV V'),
    beta=(beta, 'B N HV'),
    **api.gate_axes(g, 'B HV'),
  )
  argument_checks.check_dtypes({'q': q, 'k': k, 'v': v}, beta=beta, g=g)
  argument_checks.check_sizes(sizes)
  dtype = argument_checks.state_dtype(q)
  argument_checks.check_state('state', state, 'B HV K V', sizes, dtype)
  if normalize_qk:
    q, k = normalization.l2_normalize(q), normalization.l2_normalize(k)
  scale = sizes['K'] ** -0.5 if scale is None else scale
  return reference.delta_product_step(
    q, k, v, beta, g, state=state, scale=scale
  )
