"""The projection every layer uses."""

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax import sharding
from deltanet_jax.layers import options

INIT_STDDEV = 0.02


def _flat_dot_general(x, kernel, dimension_numbers, **options):
  """`jax.lax.dot_general` of x [..., D] and a kernel [D, F] through [N, D].

  With one leading axis the gradient of the kernel is a plain transposed
  product; with several, XLA's CPU backend copies its operands element by
  element first, which costs more than the product. Where a mesh cuts rows and
  their tokens, one axis of both could not be sharded.
  """
  ((contracted,), _), _ = dimension_numbers
  assert contracted == x.ndim - 1 and kernel.ndim == 2
  if sharding.ambient_size('sequence') > 1:
    return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
  rows = x.reshape(-1, x.shape[-1])
  y = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
  return y.reshape(*x.shape[:-1], -1)


def linear(
  in_features: int,
  out_features: int,
  *,
  use_bias: bool = False,
  dtype: options.DType,
  rngs: nnx.Rngs,
) -> nnx.Linear:
  """Returns y = x W, with W ~ N(0, 0.02^2) kept in float32.

  A bias, where asked for, starts at 0. The product is taken in `dtype`; the
  hardware sums bfloat16 in float32.
  """
  return nnx.Linear(
    in_features,
    out_features,
    use_bias=use_bias,
    dtype=jnp.dtype(dtype),
    kernel_init=nnx.initializers.normal(INIT_STDDEV),
    dot_general=_flat_dot_general,
    rngs=rngs,
  )


@jax.custom_vjp
def project_to_float32(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns x @ kernel in float32 from operands in the dtype of x.

  Plain differentiation would multiply the float32 cotangent by a bfloat16
  operand, which runs as a float32 product, the most expensive one of a model
  with a large vocabulary; here the cotangent is rounded to x's dtype first.

  Args:
    x: [B, T, D], float32 or bfloat16.
    kernel: float32 [D, V].

  Returns:
    float32 [B, T, V].
  """
  rows = x.reshape(-1, x.shape[-1])
  y = jnp.dot(rows, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
  return y.reshape(*x.shape[:-1], -1)


def _project_fwd(x, kernel):
  return project_to_float32(x, kernel), (x, kernel)


def _project_bwd(residuals, dy):
  x, kernel = residuals
  rows = x.reshape(-1, x.shape[-1])
  dy = dy.astype(x.dtype).reshape(-1, dy.shape[-1])
  dx = jnp.einsum('nv,dv->nd', dy, kernel.astype(x.dtype))
  dkernel = jnp.einsum(
    'nd,nv->dv', rows, dy, preferred_element_type=jnp.float32
  )
  return dx.reshape(x.shape), dkernel


project_to_float32.defvjp(_project_fwd, _project_bwd)
