"""Times the gated delta rule of other JAX packages beside this one's.

Each peer is its package's public function in plain XLA, called with this
project's arguments: layouts and decays are translated here, and the values and
gradients are compared, so that a time counts only if the same was computed.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
import importlib
import importlib.metadata
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import benchmark_cases
from experiments import benchmark_programs
from experiments import benchmark_timing
from experiments import result_rows
import pallas_kernels

# Of rms(difference) / rms(ours), for values and gradients in float32.
MOST_DIFFERENCE = 1e-3
OURS = 'deltanet-jax'

# tokamax's chunked form takes log-decays above -5 only, and everyone gets the
# same: lower ones are raised to -4.
_TOKAMAX_BOUND = -5.0
_LEAST_LOG_DECAY = -4.0

Op = Callable[..., tuple[jax.Array, jax.Array]]


class Peer(NamedTuple):
  """A function of another package.

  Attributes:
    package: name in the package index.
    function: what is called, for the reader.
    load: imports the package and returns the function as an `Op` of q, k, v,
      beta and g (per head) in this project's layout.
    install: what to do if it cannot be imported.
  """

  package: str
  function: str
  load: Callable[[], Op]
  install: str


def _ours(g_per_channel: bool) -> Op:
  def run(q, k, v, beta, g):
    if g_per_channel:
      g = jnp.broadcast_to(g[..., None], (*g.shape, k.shape[-1]))
    return pallas_kernels.delta_rule(q, k, v, beta, g, implementation='xla')

  return run


def _load_ejkernel() -> Op:
  modules = importlib.import_module('ejkernel.modules')
  configs = importlib.import_module('ejkernel.modules.operations.configs')
  if not hasattr(modules, 'gated_delta_rule'):
    raise ImportError(
      f'ejkernel {_version("ejkernel")} has no gated delta rule'
    )
  config = configs.GatedDeltaRuleConfig(
    chunk_size=64, platform='xla', backend='any'
  )

  def run(q, k, v, beta, g):
    return modules.gated_delta_rule(
      q,
      k,
      v,
      beta,
      g,
      use_qk_l2norm=False,
      return_state=True,
      platform='xla',
      cfg=config,
    )

  return run


def _load_tokamax() -> Op:
  """Its gate is bound * sigmoid(x): x is chosen so that this is g."""
  ops = importlib.import_module('tokamax.ops')

  def run(q, k, v, beta, g):
    heads_first = functools.partial(jnp.moveaxis, source=2, destination=0)
    share = g / _TOKAMAX_BOUND
    x = jnp.log(share) - jnp.log1p(-share)
    x = jnp.broadcast_to(x[..., None], (*x.shape, k.shape[-1]))
    o, state = ops.kimi_delta_attention(
      *map(heads_first, (q, k, v, x, beta)),
      a_log=jnp.zeros(k.shape[2]),
      output_final_state=True,
      use_gate_in_kernel=True,
      lower_bound=_TOKAMAX_BOUND,
      implementation='xla_chunked',
    )
    return jnp.moveaxis(o, 0, 2), state[:, 0]

  return run


# The first is what the others are held against.
PEERS = (
  Peer(OURS, 'delta_rule, g per head', lambda: _ours(False), ''),
  Peer(OURS, 'delta_rule, g per channel', lambda: _ours(True), ''),
  Peer(
    'tokamax',
    'ops.kimi_delta_attention, xla_chunked (g per channel)',
    _load_tokamax,
    "pip install '.[peers]'",
  ),
  Peer(
    'ejkernel',
    'modules.gated_delta_rule, xla, chunks of 64',
    _load_ejkernel,
    # It asks for jax 0.10 and runs with 0.12.
    "pip install '.[peers]', then pip install --no-deps ejkernel==0.0.80.3",
  ),
)


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def difference(found: Any, expected: Any) -> float:
  """Returns the greatest rms(found - expected) / rms(expected) of the leaves.

  Raises:
    ValueError: the trees or shapes differ.
  """

  def relative(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape:
      raise ValueError(f'shapes must be equal, got {x.shape} and {y.shape}')
    return np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))

  return float(max(jax.tree.leaves(jax.tree.map(relative, found, expected))))


def _compile(peer: Peer, arguments: Mapping[str, jax.Array]):
  """Returns (compiled program or None, reason or None)."""
  try:
    run = peer.load()
  except ImportError as error:
    return None, f'{error}; {peer.install}'
  program = benchmark_programs.compile_pass(run, 'forward_backward', arguments)
  return program, None


def rows(
  case: benchmark_cases.Case,
  *,
  repeats: int,
  peers: tuple[Peer, ...] = PEERS,
) -> Iterator[result_rows.Row]:
  """Yields a row per peer: forward and backward of one case.

  A row has `median_ms`, `min_ms`, `temp_bytes`, `difference` (from the first
  peer, the greatest of values and gradients) and `times_ours` (its median over
  the first peer's), or `reason`: why there is no time.
  """
  arguments = case.arguments()
  arguments['g'] = jnp.maximum(arguments['g'], _LEAST_LOG_DECAY)
  programs, calls, reasons, differences = {}, {}, {}, {}
  expected = None
  for peer in peers:
    program, reasons[peer] = _compile(peer, arguments)
    if program is None:
      continue
    call = program.bind(arguments)
    found = jax.device_get(call())
    expected = found if expected is None else expected
    differences[peer] = difference(found, expected)
    if differences[peer] <= MOST_DIFFERENCE:  # And is no nan.
      programs[peer], calls[peer] = program, call
    else:
      reasons[peer] = f'it differs from ours by {differences[peer]:.1e}'
  seconds = benchmark_timing.time_alternately(calls, repeats=repeats)
  for peer in peers:
    row = {
      'kind': 'peer',
      'package': peer.package,
      'package_version': _version(peer.package),
      'function': peer.function,
      'shape': case.shape,
      'pass': 'forward_backward',
    }
    if peer in programs:
      median = statistics.median(seconds[peer])
      row |= {
        'median_ms': 1e3 * median,
        'min_ms': 1e3 * min(seconds[peer]),
        'times_ours': median / statistics.median(seconds[peers[0]]),
        'temp_bytes': programs[peer].temp_bytes,
        'difference': differences[peer],
        'repeats': repeats,
      }
    else:
      row['reason'] = reasons[peer]
    yield row | result_rows.origin()


def format_row(row: result_rows.Row) -> str:
  """Returns a row as a line."""
  start = (
    f'{row["package"]:<13}{row["package_version"] or "-":<10}'
    f'{row["function"]:<55}{row["shape"]["name"]:<10}'
  )
  if 'reason' in row:
    return f'{start}not timed: {row["reason"]}'
  return (
    f'{start}{row["median_ms"]:>9.1f} ms (min {row["min_ms"]:.1f}), '
    f'{row["times_ours"]:.2f} times ours, {row["temp_bytes"] / 2**20:.1f} MiB, '
    f'difference {row["difference"]:.1e}'
  )
