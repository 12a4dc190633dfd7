"""How arrays of the host get onto the devices of all processes, and back."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

Batch = dict[str, Any]


class Placement:
  """Puts batches onto devices by rows, and fetches results.

  Attributes:
    rows: what the number of rows of a batch must be a multiple of.
  """

  def __init__(
    self,
    sharding: jax.NamedSharding | None = None,
    *,
    on_use: Callable[[], None] = lambda: None,
  ):
    """Keeps the sharding.

    Args:
      sharding: of a batch, by rows alone; None: one device.
      on_use: called for every batch that is put, a sign of life.
    """
    self._sharding = sharding
    self._on_use = on_use
    self.rows = 1
    if sharding is not None:
      whole = (sharding.mesh.size,)
      self.rows = whole[0] // sharding.shard_shape(whole)[0]

  def share(self, num_rows: int) -> tuple[int, int]:
    """Returns which share of a batch's rows this process reads, of how many.

    Processes whose devices hold the same rows read the same share.
    """
    if self._sharding is None:
      return 0, 1
    held = self._sharding.addressable_devices_indices_map((num_rows,)).values()
    rows = sorted({index[0].indices(num_rows)[:2] for index in held})
    start, stop = rows[0][0], rows[-1][1]
    size = stop - start
    covered = sum(end - begin for begin, end in rows)
    if covered != size or num_rows % size or start % size:
      return 0, 1  # Not one even share: reads all rows, uses some.
    return start // size, num_rows // size

  def put(self, batch: Batch, num_rows: int) -> Batch:
    """Puts a batch, or this process' share of it, onto the devices.

    Args:
      batch: arrays of the host, by name.
      num_rows: rows of the whole batch.

    Returns:
      The arrays of the whole batch.
    """
    self._on_use()
    if self._sharding is None:
      return jax.device_put(batch)
    with jax.transfer_guard_host_to_device('allow'):
      return {
        name: jax.make_array_from_process_local_data(
          self._sharding, array, (num_rows, *array.shape[1:])
        )
        for name, array in batch.items()
      }

  def fetch(self, tree: Any) -> Any:
    """Returns arrays, maybe spread over processes, as arrays of the host."""
    if jax.process_count() == 1:
      return jax.device_get(tree)
    with jax.transfer_guard('allow'):
      return multihost_utils.process_allgather(tree, tiled=True)
