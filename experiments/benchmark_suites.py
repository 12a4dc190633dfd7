"""What the benchmarks time: cases in suites.

`cpu` times every op at the sizes of the delta rule's specs that are tagged so,
`length` how time and memory grow with T, `paper` the setting of figure 1 of
Yang et al., "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length", 2024: tokens per batch and model width stay the same while
length and head dimension vary, `gpu` the Hopper kernels beside plain XLA.
`sequence` times nothing: those kernels must be right where two GPUs share rows.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from experiments import benchmark_cases
from pallas_kernels.delta_rule import arg_specs as delta_specs

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
    checked_parts: devices that share the time axis in these checks.
    queue_seconds: calls are queued for about that long and timed together.
    enough_seconds: once these have passed, only the first implementation is
      timed.
    row_seconds: turns of a row end once these have passed, five at least.
    slow_seconds: what takes longer takes three turns at most.
    cases_take_turns: not the implementations of a case, but the cases of the
      only implementation, so that their times can be compared.
  """

  name: str
  cases: tuple[benchmark_cases.Case, ...]
  passes: tuple[str, ...] = ('forward_backward',)
  implementations: tuple[str, ...] | None = None
  settings: Mapping[str, int] = dataclasses.field(default_factory=dict)
  checked: tuple[benchmark_cases.Case, ...] = ()
  checked_parts: int = 1
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
  cases = tuple(
    benchmark_cases.Case(**s, **variant) for s in sizes for variant in _VARIANTS
  )
  return Suite(name='cpu', cases=cases, passes=('forward', 'forward_backward'))


def _length() -> Suite:
  cases = tuple(
    benchmark_cases.Case(
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
    benchmark_cases.Case(
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
) -> benchmark_cases.Case:
  batch, length, heads, value_heads, dim = sizes
  grouped = f'_hv{value_heads}' if value_heads != heads else ''
  widths = f'd{dim}_{value_dim}' if value_dim else f'd{dim}'
  return benchmark_cases.Case(
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


def _sequence() -> Suite:
  # Parts of 100 tokens, one chunk and a half, and of 1024.
  checked = [
    _gpu_case((2, 200, 2, 4, dim), gate, normalize_qk=normalize)
    for dim in (64, 128)
    for gate in ('none', 'head')
    for normalize in (False, True)
  ]
  return Suite(
    name='sequence',
    cases=(),
    implementations=('mosaic_gpu',),
    checked=(*checked, _gpu_case((1, 2048, 2, 2, 128))),
    checked_parts=2,
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


_SUITES = {'cpu': _cpu, 'length': _length, 'gpu': _gpu, 'sequence': _sequence}
SUITES = (*_SUITES, 'paper')


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
    found = _SUITES[name]()
  return _narrow(found, only) if only else found
