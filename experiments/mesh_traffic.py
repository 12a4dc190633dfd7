"""What a step of DeltaNet sends along one axis of the mesh, by formula.

In bytes that each of n devices sends, in float32, with P the bytes of the
parameters, E those of the embedding, O of the output kernel and M of the
matrices of blocks, for L layers, R rows and N tokens of the whole batch, width
D, H heads of keys K and values V, convolutions of W taps:

    data, dcn_data  2 f P                 the sum of the gradients
    fsdp            f (E + O + 2 M)       gathers; a block's again backward
                    f (E + O) + 2 f (P - E - O)   the sum of the gradients
    tensor          2 f (4 D N (2 + (4 + p) L) + 12 N)
                    after the look-up, mixers and MLPs; what enters the p
                    projections of a mixer, the two of an MLP and the output;
                    two sums and a maximum of each token's loss
    sequence        as much as fsdp, and forward and backward
                    8 L R H K (K + V) ceil(log2 n)   transitions and states
                    8 L R 3 H K (W - 1)   the convolutions' past

where f = (n - 1) / n, as of `collectives`. XLA's CPU backend sums the gradients
of blocks by an all-reduce; with `reduce_scatter`, as on GPUs, M counts once
less. Numbers per row or head, such as segment ids and the gradient of a
head's norm, are left out.
"""

import math

import jax

import deltanet_jax
from deltanet_jax import sharding
from experiments import config as config_lib

_FLOAT = 4  # Bytes.


def _parameter_bytes(model: deltanet_jax.ModelConfig) -> dict[str, int]:
  """Returns bytes of `all`, `embedding`, `output` and the blocks' matrices."""
  shapes = jax.eval_shape(lambda: deltanet_jax.init(model, jax.random.key(0)))
  mesh = jax.sharding.AbstractMesh((2,), sharding.SHARDS[:1])
  specs = sharding.parameter_specs(shapes, mesh)
  found = {'all': 0, 'embedding': 0, 'output': 0, 'blocks': 0}
  for (path, leaf), spec in zip(
    jax.tree_util.tree_leaves_with_path(shapes),
    jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, jax.P)),
    strict=True,
  ):
    size = leaf.size * _FLOAT
    found['all'] += size
    if any(spec):
      name = path[0].key
      found[name if name in found else 'blocks'] += size
  return found


def _state_bytes(config: config_lib.TrainLMConfig, num_devices: int) -> int:
  """Returns bytes of states and halos that go along `sequence`."""
  model = config.model
  width = model.num_heads * model.resolved_head_dim
  exchanged = width * 2 * model.resolved_head_dim
  exchanged *= math.ceil(math.log2(num_devices))
  if model.delta_net.use_short_conv:
    exchanged += 3 * width * (model.delta_net.conv_width - 1)
  return 2 * _FLOAT * model.num_layers * config.data.batch_size * exchanged


def _check(config: config_lib.TrainLMConfig) -> None:
  model = config.model
  is_plain = set(model.mixers) == {'delta_net'} and not model.tie_embeddings
  if not is_plain or model.dtype != 'float32' or model.remat != 'none':
    raise ValueError(
      'the formula is for delta_net with its own output kernel, in float32 and '
      f'without remat, got mixers {model.mixers}, tie_embeddings '
      f'{model.tie_embeddings}, dtype {model.dtype}, remat {model.remat}'
    )
  accumulation = config.training.gradient_accumulation_steps
  if accumulation != 1:
    raise ValueError(
      'the formula is for training.gradient_accumulation_steps=1, got '
      f'{accumulation}'
    )


def sent_bytes(
  config: config_lib.TrainLMConfig,
  axis: str,
  num_devices: int,
  *,
  reduce_scatter: bool = False,
) -> float:
  """Returns the bytes that a device sends in a step; see the module.

  Args:
    config: of the run; all of its mesh but `axis` is of size 1.
    axis: of the mesh.
    num_devices: along the axis; divides what the axis cuts.
    reduce_scatter: how the gradients of blocks are summed along SHARDS.

  Raises:
    ValueError: the formula does not cover the config.
  """
  _check(config)
  model, f = config.model, (num_devices - 1) / num_devices
  size = _parameter_bytes(model)
  ends = size['embedding'] + size['output']
  if axis in ('data', 'dcn_data'):
    return 2 * f * size['all']
  if axis in sharding.SHARDS:
    gathered = ends + 2 * size['blocks']
    saved = size['blocks'] if reduce_scatter else 0
    sent = f * (gathered + ends + 2 * (size['all'] - ends) - saved)
    is_cut = axis == 'sequence'
    return sent + (_state_bytes(config, num_devices) if is_cut else 0)
  if axis == 'tensor':
    projections = 4 + model.delta_net.use_output_gate
    rows, length = config.data.batch_size, config.data.sequence_length
    stream = rows * length * model.model_width
    sums = 2 + (4 + projections) * model.num_layers
    return 2 * f * _FLOAT * (stream * sums + 3 * rows * length)
  raise ValueError(f'no axis of the mesh is named {axis!r}')
