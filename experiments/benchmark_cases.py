"""What the benchmarks time: ops, their variants and sizes, in suites.

`cpu` times every op at the sizes of the delta rule's specs that are tagged so,
`length` how time and memory grow with T, `paper` the setting of figure 1 of
Yang et al., "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length", 2024: tokens per batch and model width stay the same while
length and head dimension vary, `gpu` the Hopper kernels beside plain XLA.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.delta_rule import api as delta_rule_api
from pallas_kernels.delta_rule import arg_specs as delta_specs
from pallas_kernels.delta_rule import product_api
from pallas_kernels.diagonal_plus_low_rank import api as low_rank_api
from pallas_kernels.diagonal_plus_low_rank import arg_specs as low_rank_specs
from pallas_kernels.linear_attention import api as linear_api
from pallas_kernels.linear_attention import arg_specs as linear_specs

OPS: Mapping[str, dispatch.Op] = {
  op.name: op
  for op in (
    delta_rule_api.DELTA_RULE,
    product_api.DELTA_PRODUCT,
    low_rank_api.DIAGONAL_PLUS_LOW_RANK,
    linear_api.LINEAR_ATTENTION,
  )
}
GATES = ('none', 'head', 'channel')
SUITES = ('cpu', 'length', 'paper', 'gpu')
PAPER_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PAPER_HEAD_DIMS = (64, 128, 256)
PAPER_TOKENS = 16384
PAPER_MODEL_WIDTH = 2048
# B, T, H, HV and K = V.
GPU_SIZES = (
  (4, 2048, 16, 16, 128),
  (1, 8192, 96, 96, 128),
  (2, 16384, 16, 16, 128),
  (8, 1024, 8, 8, 64),
  (1, 32768, 32, 32, 128),
  (4, 4096, 64, 64, 128),
)
# Of the gated rule: those of `published_times`.
GPU_GATED_SIZES = (
  (1, 8192, 32, 32, 128),
  (1, 8192, 16, 32, 128),
  (1, 32768, 32, 32, 128),
)
# With q and k that are normalised.
GPU_NORMALIZED_SIZES = ((4, 4096, 64, 64, 128),)
# One that the kernels may refuse is last.
GPU_CHECKED_DIMS = (64, 128, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One call of an op; axes as in `pallas_kernels`.

  Attributes:
    op: public name in `pallas_kernels`.
    gate: axes of the log-decay g: `none`, `head` [B, T, H] or `channel`
      [B, T, H, K]. diagonal_plus_low_rank's is always per channel.
    normalize_qk: the delta rule divides q and k by their norms.
    keys_per_token: n of delta_product; 1 for the others.
    name: name of the sizes, in rows of results.
    B: batch; 0 where the setting leaves no whole row, see `problem`.
    T: time.
    H: heads of queries and keys; 0 as for B.
    HV: heads of values, a multiple of H; 0: as many as H.
    K: key dimension.
    V: value dimension.
    dtype: of all arguments but g, which is float32.
  """

  op: str
  gate: str = 'none'
  normalize_qk: bool = False
  keys_per_token: int = 1
  name: str
  B: int
  T: int
  H: int
  HV: int = 0
  K: int
  V: int
  dtype: str = 'float32'

  def __post_init__(self):
    for field, known in (('op', tuple(OPS)), ('gate', GATES)):
      if getattr(self, field) not in known:
        raise ValueError(
          f'{field} of {self.name} must be one of {known}, got '
          f'{getattr(self, field)!r}'
        )
    if self.normalize_qk and self.op != 'delta_rule':
      raise ValueError(f'normalize_qk of {self.op} is not timed')
    if self.keys_per_token > 1 and self.op != 'delta_product':
      raise ValueError(
        f'keys_per_token of {self.op} must be 1, got {self.keys_per_token}'
      )
    if self.HV and (not self.H or self.HV % self.H):
      raise ValueError(
        f'HV of {self.name} must be a multiple of H, got HV={self.HV} and '
        f'H={self.H}'
      )

  @property
  def value_heads(self) -> int:
    """Heads of values, with the default filled in."""
    return self.HV or self.H

  @property
  def variant(self) -> str:
    """What distinguishes the case from others of its op."""
    if self.op == 'delta_product':
      return f'n={self.keys_per_token}'
    gate = 'plain' if self.gate == 'none' else f'g per {self.gate}'
    return f'{gate}, l2' if self.normalize_qk else gate

  @property
  def problem(self) -> str | None:
    """Why the sizes cannot be run, or None."""
    if not self.B:
      return f'the tokens in all make no row of T={self.T}'
    return None if self.H else f'the width makes no head of K={self.K}'

  @property
  def function(self) -> Callable[..., Any]:
    """The op."""
    return getattr(pallas_kernels, self.op)

  @property
  def options(self) -> dict[str, bool]:
    """What the op is called with beside arrays."""
    return {'normalize_qk': True} if self.normalize_qk else {}

  @property
  def shape(self) -> dict[str, str | int]:
    """The sizes as rows of results name them."""
    sizes = {axis: getattr(self, axis) for axis in 'B T H K V'.split()}
    return {
      'name': self.name,
      'dtype': self.dtype,
      'HV': self.value_heads,
    } | sizes

  def arguments(self) -> dict[str, jax.Array]:
    """Returns random arguments: keys of norm 1, beta in (0, 1), g < 0."""
    if self.op == 'diagonal_plus_low_rank':
      spec = low_rank_specs.ArgSpec(**self.shape)
      return low_rank_specs.random_arguments(spec)
    linear = linear_specs.ArgSpec(gate=self.gate, **self.shape).arguments()
    if self.op == 'linear_attention':
      return _draw(linear)
    n = self.keys_per_token
    spec = delta_specs.ArgSpec(**self.shape | {'T': n * self.T})
    arrays = _draw(spec.arguments() | _gate(linear))
    if self.op == 'delta_product':
      arrays = {
        name: x.reshape(self.B, self.T, n, *x.shape[2:])
        for name, x in arrays.items()
      }
      arrays['q'] = arrays['q'][:, :, 0]
    return arrays


def _gate(given: Mapping[str, Any]) -> dict[str, Any]:
  return {name: x for name, x in given.items() if name == 'g'}


def _draw(given: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Returns arrays drawn on the device: a host is slow at billions of them."""
  arrays = {}
  for i, (name, x) in enumerate(given.items()):
    array = jax.random.normal(jax.random.key(i), x.shape, jnp.float32)
    if name == 'k':
      array /= jnp.linalg.norm(array, axis=-1, keepdims=True)
    elif name == 'beta':
      array = jax.nn.sigmoid(array)
    elif name == 'g':
      array = -jnp.exp(array - 2)
    arrays[name] = array.astype(x.dtype)
  return arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """Cases, and what is timed of each.

  Attributes:
    name: one of `SUITES`.
    cases: what is timed.
    passes: names in `benchmark_programs.PASSES`; a pass with a published time
      is timed too.
    implementations: names, or None for all that an op has.
    settings: what the sizes were made from; goes into every row.
    checked: cases on which the first implementation must be right, or nothing
      is timed; see `kernel_checks`.
    queue_seconds: calls are queued for about that long and timed together.
    enough_seconds: once these have passed, only the first implementation is
      timed.
    row_seconds: turns of a row end once these have passed, five at least.
    slow_seconds: what takes longer takes three turns at most.
    cases_take_turns: not the implementations of a case, but the cases of the
      only implementation, so that their times can be compared.
  """

  name: str
  cases: tuple[Case, ...]
  passes: tuple[str, ...] = ('forward_backward',)
  implementations: tuple[str, ...] | None = None
  settings: Mapping[str, int] = dataclasses.field(default_factory=dict)
  checked: tuple[Case, ...] = ()
  queue_seconds: float = 0.0
  enough_seconds: float = math.inf
  row_seconds: float = 5.0
  slow_seconds: float = math.inf
  cases_take_turns: bool = False


_VARIANTS = (
  {'op': 'delta_rule'},
  {'op': 'delta_rule', 'gate': 'head'},
  {'op': 'delta_rule', 'gate': 'channel'},
  {'op': 'delta_product', 'keys_per_token': 2},
  {'op': 'diagonal_plus_low_rank', 'gate': 'channel'},
  {'op': 'linear_attention'},
  {'op': 'linear_attention', 'gate': 'head'},
  {'op': 'linear_attention', 'gate': 'channel'},
)


def _cpu() -> Suite:
  specs = delta_specs.with_tag('cpu')
  sizes = [
    {axis: getattr(s, axis) for axis in 'name B T H K V dtype'.split()}
    for s in specs
  ]
  cases = tuple(Case(**s, **variant) for s in sizes for variant in _VARIANTS)
  return Suite(name='cpu', cases=cases, passes=('forward', 'forward_backward'))


def _length() -> Suite:
  cases = tuple(
    Case(
      op='delta_rule',
      gate=gate,
      name=f'length_{thousands}k',
      B=1,
      T=1024 * thousands,
      H=2,
      K=64,
      V=64,
    )
    for gate in ('none', 'head')
    for thousands in (1, 2, 4, 8, 16, 32, 64)
  )
  return Suite(
    name='length',
    cases=cases,
    implementations=('xla',),
    row_seconds=120.0,
    cases_take_turns=True,
  )


def _paper(tokens: int, model_width: int) -> Suite:
  cases = tuple(
    Case(
      op='delta_rule',
      name=f'paper_{dim}_{length}',
      B=tokens // length,
      T=length,
      H=model_width // dim,
      K=dim,
      V=dim,
      dtype='bfloat16',
    )
    for dim in PAPER_HEAD_DIMS
    for length in PAPER_LENGTHS
  )
  settings = {'tokens': tokens, 'model_width': model_width}
  return Suite(
    name='paper',
    cases=cases,
    settings=settings,
    row_seconds=2.0,
    slow_seconds=1.0,
  )


def _gpu_case(
  sizes: tuple[int, ...], gate: str = 'none', value_dim: int = 0, **options
) -> Case:
  batch, length, heads, value_heads, dim = sizes
  grouped = f'_hv{value_heads}' if value_heads != heads else ''
  widths = f'd{dim}_{value_dim}' if value_dim else f'd{dim}'
  return Case(
    op='delta_rule',
    gate=gate,
    name=f'b{batch}_t{length}_h{heads}{grouped}_{widths}',
    B=batch,
    T=length,
    H=heads,
    HV=value_heads,
    K=dim,
    V=value_dim or dim,
    dtype='bfloat16',
    **options,
  )


def _gpu() -> Suite:
  checked = [
    _gpu_case((2, 200, heads, 4, dim), gate)
    for dim in GPU_CHECKED_DIMS
    for heads, gate in ((4, 'none'), (2, 'none'), (2, 'head'))
  ]
  checked += [
    _gpu_case((2, 200, 2, 4, key_dim), gate, value_dim)
    for key_dim, value_dim in ((64, 128), (128, 64))
    for gate in ('none', 'head')
  ]
  checked += [
    _gpu_case((2, 200, 2, 4, dim), gate, normalize_qk=True)
    for dim in (64, 128)
    for gate in ('none', 'head')
  ]
  normalized = [
    _gpu_case(sizes, normalize_qk=True) for sizes in GPU_NORMALIZED_SIZES
  ]
  gated = [_gpu_case(sizes, 'head') for sizes in GPU_GATED_SIZES]
  return Suite(
    name='gpu',
    cases=(*map(_gpu_case, GPU_SIZES), *gated, *normalized),
    passes=('forward', 'forward_backward'),
    implementations=('mosaic_gpu', 'xla'),
    checked=(*checked, _gpu_case((1, 2048, 2, 2, 128))),
    queue_seconds=0.03,
    enough_seconds=380.0,
    row_seconds=1.5,
    slow_seconds=0.25,
  )


def _narrow(suite: Suite, only: Sequence[str]) -> Suite:
  names = tuple(dict.fromkeys(case.name for case in suite.cases))
  unknown = [name for name in only if name not in names]
  if unknown:
    raise ValueError(
      f'the suite {suite.name} has the sizes {", ".join(names)}, got '
      f'{", ".join(unknown)}'
    )
  cases = tuple(case for case in suite.cases if case.name in only)
  dims = {dim for case in cases for dim in (case.K, case.V)}
  checked = tuple(c for c in suite.checked if {c.K, c.V} <= dims)
  return dataclasses.replace(suite, cases=cases, checked=checked)


def suite(
  name: str,
  *,
  tokens: int = PAPER_TOKENS,
  model_width: int = PAPER_MODEL_WIDTH,
  only: Sequence[str] = (),
) -> Suite:
  """Returns a suite.

  Args:
    name: one of `SUITES`.
    tokens: B T of the paper's suite.
    model_width: H K of the paper's suite.
    only: names of sizes to leave the others out, and checks of other head
      dimensions with them; empty: all.

  Raises:
    ValueError: there is no such suite, or it has no such sizes.
  """
  if name not in SUITES:
    raise ValueError(f'the suite must be one of {SUITES}, got {name!r}')
  if name == 'paper':
    found = _paper(tokens, model_width)
  else:
    found = {'cpu': _cpu, 'length': _length, 'gpu': _gpu}[name]()
  return _narrow(found, only) if only else found
