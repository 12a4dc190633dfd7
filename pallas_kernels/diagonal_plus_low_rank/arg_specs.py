"""Named shapes of the op, shared by tests and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

TAGS = ('ci', 'cpu', 'paper')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """The sizes of one call; axes as in `api.diagonal_plus_low_rank`.

  Attributes:
    name: unique name, in test ids and rows of results.
    B: batch.
    T: time.
    H: heads of q, k, a and b.
    HV: value heads, a multiple of H.
    K: key dimension.
    V: value dimension.
    dtype: name of the dtype of q, k, v, a and b; g is float32.
    tags: what the shape is for: `ci` (seconds in a test), `cpu` (timed on
      CPUs), `paper` (a layer of RWKV-7's 1.5B model).
  """

  name: str
  B: int
  T: int
  H: int
  HV: int
  K: int
  V: int
  dtype: str = 'float32'
  tags: tuple[str, ...] = ()

  def __post_init__(self):
    for axis in ('B', 'T', 'H', 'HV', 'K', 'V'):
      size = getattr(self, axis)
      if size < 1:
        raise ValueError(f'{axis} of {self.name} must be >= 1, got {size}')
    if self.HV % self.H:
      raise ValueError(
        f'HV of {self.name} must be a multiple of H, got HV={self.HV} and '
        f'H={self.H}'
      )
    unknown = set(self.tags) - set(TAGS)
    if unknown:
      raise ValueError(
        f'tags of {self.name} must be among {TAGS}, got {sorted(unknown)}'
      )

  def arguments(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of q, k, v, a, b and g (per channel) by name."""
    keys = (self.B, self.T, self.H, self.K)
    values = (self.B, self.T, self.HV, self.V)
    shapes = {'q': keys, 'k': keys, 'v': values, 'a': keys, 'b': keys}
    dtype = jnp.dtype(self.dtype)
    found = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in shapes.items()}
    gates = (*values[:-1], self.K)
    return found | {'g': jax.ShapeDtypeStruct(gates, jnp.float32)}


def random_arguments(spec: ArgSpec, *, seed: int = 0) -> dict[str, jax.Array]:
  """Returns random arguments as RWKV-7 makes them.

  b is of norm 1, a = -eta b with a rate eta in (0, 1) per channel, k of norm
  about 1, g = -exp(-1/2) s with s in (0, 1) per channel.
  """
  rng = np.random.default_rng(seed)
  given = spec.arguments()
  arrays = {name: rng.standard_normal(x.shape) for name, x in given.items()}
  arrays['k'] /= np.sqrt(spec.K)
  arrays['b'] /= np.linalg.norm(arrays['b'], axis=-1, keepdims=True)
  arrays['a'] = -arrays['b'] / (1 + np.exp(-arrays['a']))
  arrays['g'] = -np.exp(-0.5) / (1 + np.exp(-arrays['g']))
  return {n: jnp.asarray(x, given[n].dtype) for n, x in arrays.items()}


def _spec(name, B, T, H, HV, K, V, dtype, tag) -> ArgSpec:  # noqa: N803
  return ArgSpec(
    name=name, B=B, T=T, H=H, HV=HV, K=K, V=V, dtype=dtype, tags=(tag,)
  )


SPECS = (
  _spec('one_token', 2, 1, 1, 1, 8, 8, 'float32', 'ci'),
  _spec('short', 1, 7, 2, 2, 16, 8, 'float32', 'ci'),
  _spec('ragged', 2, 75, 2, 2, 16, 24, 'float32', 'ci'),
  _spec('grouped', 2, 50, 2, 6, 16, 16, 'float32', 'ci'),
  _spec('one_dim', 1, 40, 1, 2, 1, 1, 'float32', 'ci'),
  _spec('head_64', 1, 100, 1, 1, 64, 64, 'float32', 'ci'),
  _spec('cpu_64', 1, 2048, 4, 4, 64, 64, 'float32', 'cpu'),
  _spec('paper_4k', 4, 4096, 32, 32, 64, 64, 'bfloat16', 'paper'),
)


def with_tag(tag: str) -> tuple[ArgSpec, ...]:
  """Returns the specs that carry a tag.

  Raises:
    ValueError: there is no such tag.
  """
  if tag not in TAGS:
    raise ValueError(f'the tag must be one of {TAGS}, got {tag!r}')
  return tuple(spec for spec in SPECS if tag in spec.tags)
