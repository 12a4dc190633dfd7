"""Named shapes of linear attention, shared by tests and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

TAGS = ('ci', 'cpu', 'paper')
GATES = ('none', 'constant', 'head', 'channel')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
  """The sizes of one call; axes as in `api.linear_attention`.

  Attributes:
    name: unique name, in test ids and rows of results.
    B: batch.
    T: time.
    H: query and key heads.
    HV: value heads, a multiple of H.
    K: key dimension.
    V: value dimension.
    gate: axes of g: `none`, `constant` [HV], `head` [B, T, HV] or `channel`
      [B, T, HV, K].
    has_bonus: whether there is a bonus.
    dtype: name of the dtype of q, k and v; g and bonus are float32.
    tags: what the shape is for: `ci` (seconds in a test), `cpu` (timed on
      CPUs), `paper` (a layer of the paper's 1.3B models).
  """

  name: str
  B: int
  T: int
  H: int
  HV: int
  K: int
  V: int
  gate: str = 'none'
  has_bonus: bool = False
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
    if self.gate not in GATES:
      raise ValueError(
        f'gate of {self.name} must be one of {GATES}, got {self.gate!r}'
      )
    unknown = set(self.tags) - set(TAGS)
    if unknown:
      raise ValueError(
        f'tags of {self.name} must be among {TAGS}, got {sorted(unknown)}'
      )

  def arguments(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape and dtype of q, k, v and, if any, g and bonus by name."""
    keys = (self.B, self.T, self.H, self.K)
    values = (self.B, self.T, self.HV, self.V)
    dtype = jnp.dtype(self.dtype)
    found = {
      name: jax.ShapeDtypeStruct(shape, dtype)
      for name, shape in (('q', keys), ('k', keys), ('v', values))
    }
    gates = {
      'constant': (self.HV,),
      'head': values[:-1],
      'channel': (*values[:-1], self.K),
    }
    if self.gate in gates:
      found['g'] = jax.ShapeDtypeStruct(gates[self.gate], jnp.float32)
    if self.has_bonus:
      found['bonus'] = jax.ShapeDtypeStruct((self.HV, self.K), jnp.float32)
    return found


def random_arguments(spec: ArgSpec, *, seed: int = 0) -> dict[str, jax.Array]:
  """Returns random arrays: keys of norm 1, g about -exp(N(-2, 1))."""
  rng = np.random.default_rng(seed)
  given = spec.arguments()
  arrays = {name: rng.standard_normal(a.shape) for name, a in given.items()}
  arrays['k'] /= np.linalg.norm(arrays['k'], axis=-1, keepdims=True)
  if 'g' in arrays:
    arrays['g'] = -np.exp(arrays['g'] - 2)
  return {n: jnp.asarray(a, given[n].dtype) for n, a in arrays.items()}


def _specs(tag, dtype, sizes, **models) -> tuple[ArgSpec, ...]:
  """Returns a spec of some sizes per model: name=(gate, has_bonus)."""
  return tuple(
    ArgSpec(
      name=f'{tag}_{name}',
      gate=gate,
      has_bonus=has_bonus,
      dtype=dtype,
      tags=(tag,),
      **sizes,
    )
    for name, (gate, has_bonus) in models.items()
  )


_MODELS = {
  'linear': ('none', False),
  'retnet': ('constant', False),
  'mamba2': ('head', False),
  'gla': ('channel', False),
  'rwkv6': ('channel', True),
}
_CI = {'B': 2, 'T': 75, 'H': 2, 'HV': 4, 'K': 16, 'V': 24}
_CPU = {'B': 1, 'T': 2048, 'H': 4, 'HV': 4, 'K': 64, 'V': 64}
# A layer of width 2048 at 16384 tokens per batch.
_PAPER = {'B': 8, 'T': 2048, 'H': 16, 'HV': 16, 'K': 128, 'V': 128}

SPECS = (
  *_specs('ci', 'float32', _CI, **_MODELS),
  *_specs('cpu', 'float32', _CPU, **_MODELS),
  *_specs('paper', 'bfloat16', _PAPER, **_MODELS),
)


def with_tag(tag: str) -> tuple[ArgSpec, ...]:
  """Returns the specs that carry a tag.

  Raises:
    ValueError: there is no such tag.
  """
  if tag not in TAGS:
    raise ValueError(f'the tag must be one of {TAGS}, got {tag!r}')
  return tuple(spec for spec in SPECS if tag in spec.tags)
