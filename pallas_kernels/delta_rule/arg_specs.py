"""Named shapes of the delta rule, shared by tests and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

TAGS = ('ci', 'cpu', 'paper', 'long')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """The sizes of one call; axes as in `api.delta_rule`.

  Attributes:
    name: unique name, in test ids and rows of results.
    B: batch.
    T: time.
    H: query and key heads.
    HV: value heads, a multiple of H.
    K: key dimension.
    V: value dimension.
    dtype: name of the dtype of q, k, v and beta.
    tags: what the shape is for: `ci` (seconds in a test), `cpu` (timed on
      CPUs), `paper` (timed in the paper), `long` (long sequences).
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
    """Returns shape and dtype of q, k, v and beta by name."""
    shapes = {
      'q': (self.B, self.T, self.H, self.K),
      'k': (self.B, self.T, self.H, self.K),
      'v': (self.B, self.T, self.HV, self.V),
      'beta': (self.B, self.T, self.HV),
    }
    dtype = jnp.dtype(self.dtype)
    return {n: jax.ShapeDtypeStruct(s, dtype) for n, s in shapes.items()}


def random_arguments(spec: ArgSpec, *, seed: int = 0) -> dict[str, jax.Array]:
  """Returns random q, k, v, beta: keys of norm 1, beta in (0, 1)."""
  rng = np.random.default_rng(seed)
  arrays = {
    name: rng.standard_normal(argument.shape)
    for name, argument in spec.arguments().items()
  }
  arrays['k'] /= np.linalg.norm(arrays['k'], axis=-1, keepdims=True)
  arrays['beta'] = 1 / (1 + np.exp(-arrays['beta']))
  return {n: jnp.asarray(a, jnp.dtype(spec.dtype)) for n, a in arrays.items()}


def _spec(name, B, T, H, HV, K, V, dtype, *tags) -> ArgSpec:  # noqa: N803
  return ArgSpec(
    name=name, B=B, T=T, H=H, HV=HV, K=K, V=V, dtype=dtype, tags=tags
  )


# The paper times a layer of width 2048 at a constant 16384 tokens per batch.
SPECS = (
  _spec('one_token', 2, 1, 1, 1, 8, 8, 'float32', 'ci'),
  _spec('short', 1, 7, 2, 2, 16, 8, 'float32', 'ci'),
  _spec('whole_chunks', 1, 64, 1, 1, 32, 32, 'float32', 'ci'),
  _spec('ragged', 2, 75, 2, 2, 16, 24, 'float32', 'ci'),
  _spec('grouped', 2, 50, 2, 6, 16, 16, 'float32', 'ci'),
  _spec('one_dim', 1, 40, 1, 2, 1, 1, 'float32', 'ci'),
  _spec('narrow', 1, 40, 1, 2, 4, 1, 'float32', 'ci'),
  _spec('head_64', 1, 100, 1, 1, 64, 64, 'float32', 'ci'),
  _spec('head_128', 1, 130, 1, 1, 128, 128, 'float32', 'ci'),
  _spec('cpu_64', 1, 2048, 4, 4, 64, 64, 'float32', 'cpu'),
  _spec('cpu_128', 1, 2048, 4, 4, 128, 128, 'float32', 'cpu'),
  _spec('paper_2k', 8, 2048, 16, 16, 128, 128, 'bfloat16', 'paper'),
  _spec('paper_4k', 4, 4096, 16, 16, 128, 128, 'bfloat16', 'paper'),
  _spec('paper_8k', 2, 8192, 16, 16, 128, 128, 'bfloat16', 'paper'),
  _spec('paper_16k', 1, 16384, 16, 16, 128, 128, 'bfloat16', 'paper', 'long'),
)


def with_tag(tag: str) -> tuple[ArgSpec, ...]:
  """Returns the specs that carry a tag.

  Raises:
    ValueError: there is no such tag.
  """
  if tag not in TAGS:
    raise ValueError(f'the tag must be one of {TAGS}, got {tag!r}')
  return tuple(spec for spec in SPECS if tag in spec.tags)
