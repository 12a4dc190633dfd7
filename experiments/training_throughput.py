"""Measures the training throughput of the paper's 1.3B models.

Tokens of a step stay the same while rows grow longer: 2048 x 8 to 16384 x 1;
with a mesh of n devices, n times as many rows.
What is timed is `train_step.build`, the step that trains, on random tokens in
rows of one document. `remat` is dots, which is faster on a GPU than to keep all
activations, or full where there is no memory for it; the layers are written out
(`scan_layers` False).

The share of a GPU's peak (MFU) is by 6 N + 6 L D T operations a token: N the
parameters but for the embedding, which is looked up, and L the layers of
attention, of which a token sees half of T on average. What recurrences and
convolutions compute is not counted.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import itertools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import deltanet_jax
from experiments import benchmark_programs
from experiments import config as config_lib
from experiments import result_rows
from experiments.training import mesh as mesh_lib
from experiments.training import train_step

Row = dict[str, Any]

KIND = 'throughput'
# Fields of a row that say what it is about.
ABOUT = ('kind', 'model', 'size', 'dtype', 'length', 'batch', 'mesh')
MODELS = ('delta_net', 'transformer', 'gla', 'mamba')
LENGTHS = (2048, 4096, 8192, 16384)
MESHES = ('data=1',)
REMATS = ('dots', 'full')  # The first that fits is timed.
# Thousands of tokens per second on one H100, by `LENGTHS`, read off figure 6 of
# Yang et al., 2024, to about 0.2.
PAPER_KILOTOKENS = {
  'delta_net': (41.5, 41.6, 40.0, 37.3),
  'transformer': (51.3, 46.7, 38.7, 29.0),
  'gla': (43.8, 43.5, 43.2, 41.1),
  'mamba': (22.8, 22.8, 22.8, 26.0),
}
# Products in bfloat16 without sparsity, NVIDIA's data sheets.
PEAK_FLOPS_PER_S = {'H100': 989e12, 'H200': 989e12}

_STEPS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What is measured.

  Attributes:
    size: of `deltanet_jax.preset`.
    tokens: of a step, per device.
    mesh: of the devices, the first there are.
    row_seconds: nothing is started for a row once these have passed.
    memory_limit: bytes; None means the device's.
  """

  size: str = '1b'
  tokens: int = 16384
  mesh: config_lib.MeshConfig = config_lib.MeshConfig(data=1)
  row_seconds: float = 150.0
  memory_limit: int | None = None

  @property
  def num_devices(self) -> int:
    """Devices of the mesh."""
    return math.prod(dataclasses.astuple(self.mesh))

  @property
  def axes(self) -> dict[str, int]:
    """The axes of the mesh that are larger than 1."""
    sizes = dataclasses.asdict(self.mesh)
    return {axis: size for axis, size in sizes.items() if size > 1}

  @property
  def step_tokens(self) -> int:
    """Tokens of a step, of all devices."""
    return self.tokens * self.num_devices

  def batch_size(self, length: int) -> int:
    """Returns the rows of a step.

    Raises:
      ValueError: the length does not divide the tokens.
    """
    if length < 1 or self.step_tokens % length:
      raise ValueError(
        f'a length must divide the {self.step_tokens} tokens of a step, got '
        f'{length}'
      )
    return self.step_tokens // length


class _NotRunError(Exception):
  """Why a step could not be run; another `remat` may help."""


def flops_per_token(model: deltanet_jax.ModelConfig, length: int) -> float:
  """Returns the operations that training takes a token, see the module."""
  parameters = deltanet_jax.count_parameters(model)
  if not model.tie_embeddings:
    parameters -= model.vocab_size * model.model_width
  share = model.mixers.count('attention') / len(model.mixers)
  layers = share * model.num_layers
  return 6 * parameters + 6 * layers * model.model_width * length


def peak_flops_per_s() -> float | None:
  """Returns the peak of the first device; None where it is not known."""
  kind = jax.devices()[0].device_kind
  peaks = [peak for name, peak in PEAK_FLOPS_PER_S.items() if name in kind]
  return peaks[0] if peaks else None


def _config(name: str, length: int, remat: str, setting: Setting):
  model = deltanet_jax.preset(name, setting.size)
  return config_lib.TrainLMConfig(
    model=dataclasses.replace(model, remat=remat, scan_layers=False),
    data=config_lib.DataConfig(
      batch_size=setting.batch_size(length), sequence_length=length
    ),
    training=config_lib.TrainingConfig(num_steps=10_000),
    mesh=setting.mesh,
  )


def parse_mesh(text: str) -> config_lib.MeshConfig:
  """Returns the mesh of a text like 'fsdp=2' or 'fsdp=2+tensor=4'.

  Raises:
    ValueError: there is no such axis, or its size is no number above 0.
  """
  sizes = {'data': 1}
  for part in text.split('+'):
    name, _, size = part.partition('=')
    if name not in mesh_lib.AXES or not size.isdecimal() or not int(size):
      raise ValueError(
        f'a mesh must be like fsdp=2+tensor=4, of {", ".join(mesh_lib.AXES)}, '
        f'got {text!r}'
      )
    sizes[name] = int(size)
  return config_lib.MeshConfig(**sizes)


def settings(size: str, tokens: int, meshes: Iterable[str]) -> list[Setting]:
  """Returns a setting for each mesh, a text for `parse_mesh`."""
  return [
    Setting(size=size, tokens=tokens, mesh=parse_mesh(mesh)) for mesh in meshes
  ]


def _batch(config: config_lib.TrainLMConfig) -> train_step.Batch:
  shape = (config.data.batch_size, config.data.sequence_length + 1)
  tokens = jax.random.randint(
    jax.random.key(1), shape, 0, config.model.vocab_size, jnp.int32
  )
  return {'tokens': tokens}


def _needed_bytes(compiled: jax.stages.Compiled) -> int:
  """Returns the memory of a step; the new state takes the old one's."""
  memory = compiled.memory_analysis()
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def _timed_steps(step, config, mesh, deadline: float) -> Row:
  """Returns the seconds of steps after the first, and all losses."""
  state = train_step.build_init(config, mesh)()
  batch = jax.device_put(_batch(config), mesh_lib.batch_sharding(mesh))
  state, metrics = jax.block_until_ready(step(state, batch))
  seconds, losses = [], [metrics['loss']]
  while len(seconds) < _STEPS:
    begin = time.perf_counter()
    if seconds and begin > deadline:
      break
    state, metrics = jax.block_until_ready(step(state, batch))
    seconds.append(time.perf_counter() - begin)
    losses.append(metrics['loss'])
  return {'step_seconds': seconds, 'losses': list(map(float, losses))}


def _run(config: config_lib.TrainLMConfig, limit: int, deadline: float) -> Row:
  """Compiles and times a step.

  Raises:
    _NotRunError: memory is short.
  """
  size = math.prod(dataclasses.astuple(config.mesh))
  mesh = mesh_lib.build(config, jax.devices()[:size])
  begin = time.perf_counter()
  try:
    step = train_step.build(config, mesh)
    state = train_step.abstract_state(config, mesh)
    batch = jax.eval_shape(lambda: _batch(config))
    compiled = step.lower(state, batch).compile()
    needed = _needed_bytes(compiled)
    reason = benchmark_programs.too_large(needed, limit)
    if reason:
      raise _NotRunError(reason)
    compile_seconds = time.perf_counter() - begin
    found = _timed_steps(compiled, config, mesh, deadline)
  except jax.errors.JaxRuntimeError as error:
    raise _NotRunError(benchmark_programs.exhausted(error)) from error
  stats = jax.devices()[0].memory_stats() or {}
  return {
    **found,
    'compile_seconds': compile_seconds,
    'needed_bytes': needed,
    # Since the process began, so of the largest step so far.
    'peak_bytes_in_use': stats.get('peak_bytes_in_use'),
  }


def _first_that_fits(name, length, remats, setting) -> Row:
  """Returns what was measured with the least recomputation, or `reason`."""
  limit = setting.memory_limit
  if limit is None:
    limit = benchmark_programs.memory_limit()
  deadline = time.perf_counter() + setting.row_seconds
  reasons: dict[str, str] = {}
  late = []
  for remat in remats:
    if time.perf_counter() > deadline:
      late.append(f'{setting.row_seconds:.0f} s had passed')
      break
    config = _config(name, length, remat, setting)
    try:
      found = _run(config, limit, deadline)
    except _NotRunError as error:
      reasons[remat] = str(error)
    else:
      scan_layers = config.model.scan_layers
      return {
        'remat': remat,
        'scan_layers': scan_layers,
        'too_large': reasons,
        **found,
      }
  texts = [f'{remat}: {reason}' for remat, reason in reasons.items()]
  reason = '; '.join(texts + late)
  return {'remat': None, 'too_large': reasons, 'reason': reason}


def _paper_tokens_per_s(name: str, length: int, setting: Setting):
  papers = ('1b', 16384, 1)
  is_papers = (setting.size, setting.tokens, setting.num_devices) == papers
  if not is_papers or name not in PAPER_KILOTOKENS or length not in LENGTHS:
    return None
  return 1e3 * PAPER_KILOTOKENS[name][LENGTHS.index(length)]


def measure(
  name: str, length: int, setting: Setting, remats: Sequence[str] = REMATS
) -> Row:
  """Returns a row of results: speed, memory and MFU, or `reason`.

  Args:
    name: of a model of `deltanet_jax.preset`.
    length: tokens of a row.
    setting: what is measured.
    remats: what is tried, in that order.
  """
  found = _first_that_fits(name, length, remats, setting)
  model = deltanet_jax.preset(name, setting.size)
  flops = flops_per_token(model, length)
  speed = mfu = None
  if 'reason' not in found:
    speed = setting.step_tokens / statistics.median(found['step_seconds'])
    peak = peak_flops_per_s()
    mfu = speed * flops / (peak * setting.num_devices) if peak else None
  return {
    'kind': KIND,
    'model': name,
    'size': setting.size,
    'dtype': model.dtype,
    'length': length,
    'batch': setting.batch_size(length),
    'mesh': setting.axes,
    'parameters': deltanet_jax.count_parameters(model),
    'flops_per_token': flops,
    'tokens_per_s': speed,
    'mfu': mfu,
    'paper_tokens_per_s': _paper_tokens_per_s(name, length, setting),
    **found,
    **result_rows.origin(),
  }


def rows(
  settings: Iterable[Setting],
  names: Iterable[str],
  lengths: Iterable[int],
  remats: Sequence[str] = REMATS,
) -> Iterator[Row]:
  """Yields a row per setting, model and length.

  What did not fit at one length is not tried at the next: the tokens of a step
  are the same.
  """
  lengths = list(lengths)
  for setting, name in itertools.product(settings, names):
    left = remats
    for length in lengths:
      row = measure(name, length, setting, left)
      fits = [remat for remat in left if remat not in row['too_large']]
      left = fits or left[-1:]
      yield row


def place(row: Row) -> str:
  """Returns the shape of a step's tokens and, of several devices, the mesh."""
  axes = ' '.join(f'{axis}={n}' for axis, n in row.get('mesh', {}).items())
  return f'{row["length"]} x {row["batch"]} {axes}'.strip()


def header() -> str:
  """Returns the heading of the table."""
  return (
    f'{"model":14}{"T x B, mesh":>24}{"remat":>7}{"tokens/s":>12}{"paper":>10}'
    f'{"MFU":>8}{"GiB":>7}{"compile s":>11}'
  )


def format_row(row: Row) -> str:
  """Returns a line under `header`."""
  start = f'{row["model"]:14}{place(row):>24}'
  if 'reason' in row:
    return f'{start}  {row["reason"]}'
  paper = row['paper_tokens_per_s']
  return (
    f'{start}{row["remat"]:>7}{row["tokens_per_s"]:12,.0f}'
    f'{"" if paper is None else f"{paper:,.0f}":>10}'
    f'{"" if row["mfu"] is None else f"{row['mfu']:.1%}":>8}'
    f'{row["needed_bytes"] / 2**30:7.1f}{row["compile_seconds"]:11.1f}'
  )
