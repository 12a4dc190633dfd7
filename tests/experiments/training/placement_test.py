import jax
import numpy as np
import pytest

from experiments.training import placement as placement_lib


def on_mesh(**axes):
  mesh = jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
    devices=jax.devices()[: int(np.prod(list(axes.values())))],
  )
  return jax.NamedSharding(mesh, jax.P(('data', 'fsdp')))


@pytest.mark.parametrize(
  ('axes', 'rows'),
  [
    ({'data': 1, 'fsdp': 1}, 1),
    ({'data': 2, 'fsdp': 4}, 8),
    ({'data': 2, 'fsdp': 1, 'tensor': 4}, 2),
  ],
)
def test_rows_are_those_that_every_device_gets_a_share_of(axes, rows):
  placement = placement_lib.Placement(on_mesh(**axes))
  assert placement.rows == rows
  assert placement.share(8) == (0, 1)


def test_a_batch_returns_as_it_was_put():
  used = []
  placement = placement_lib.Placement(
    on_mesh(data=2, fsdp=2), on_use=lambda: used.append(1)
  )
  batch = {'tokens': np.arange(24, dtype=np.int32).reshape(8, 3)}
  with jax.transfer_guard('disallow'):
    put = placement.put(batch, 8)
  assert put['tokens'].sharding == on_mesh(data=2, fsdp=2)
  np.testing.assert_array_equal(placement.fetch(put)['tokens'], batch['tokens'])
  assert used == [1]


class HeldByProcess:
  """A sharding as one process of several sees it: the rows of its devices."""

  def __init__(self, *rows):
    self._rows = rows

  def addressable_devices_indices_map(self, shape):
    del shape
    return {i: (slice(*rows),) for i, rows in enumerate(self._rows)}


@pytest.mark.parametrize(
  ('rows', 'share'),
  [
    ([(0, 2), (2, 4)], (0, 2)),
    ([(4, 6), (6, 8)], (1, 2)),
    ([(6, 8), (6, 8)], (3, 4)),  # The devices share the tensors of its rows.
    ([(0, 2), (4, 6)], (0, 1)),  # Not one block: reads all.
    ([(2, 4), (4, 6)], (0, 1)),  # A block that begins within a share.
    ([(None, None)], (0, 1)),
  ],
)
def test_a_process_reads_the_share_that_its_devices_hold(rows, share):
  placement = placement_lib.Placement()
  placement._sharding = HeldByProcess(*rows)
  assert placement.share(8) == share
