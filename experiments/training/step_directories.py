"""The files of a run's checkpoints: names, publishing, checking, deleting.

A directory of checkpoints holds

    <step>/          a checkpoint: orbax's files and the seal CHECKSUMS.json
    <step>.writing*  a save under way, or the leftover of one that did not end
    <step>.deleting  a checkpoint on its way out
    <step>.damaged   one that failed its check; kept for a person to look at

The one rename of `<step>.writing` to `<step>`, after the seal, publishes a
checkpoint: whatever is killed at whatever moment, `<step>` is whole. A `<step>`
without a seal is therefore damage, too.
"""

from collections.abc import Iterable
import itertools
import os
import pathlib
import shutil
from typing import Any

from absl import logging

from experiments import config as config_lib
from experiments.training import seals

_LEFTOVERS = ('*.writing*', '*.deleting')


class StepDirectories:
  """The steps below one directory; reads and renames, knows no arrays."""

  def __init__(self, root: str | os.PathLike):
    self.root = pathlib.Path(root).absolute()

  def path(self, step: int) -> pathlib.Path:
    """Returns where the checkpoint of a step is published."""
    return self.root / str(step)

  def writing_path(self, step: int) -> pathlib.Path:
    """Returns where the checkpoint of a step is written."""
    return self.root / f'{step}.writing'

  def steps(self) -> list[int]:
    """Returns the steps of the published checkpoints, newest first."""
    if not self.root.is_dir():
      return []
    names = [path.name for path in self.root.iterdir() if path.is_dir()]
    return sorted((int(n) for n in names if _is_step(n)), reverse=True)

  def names_kept_aside(self) -> list[str]:
    """Returns the names of the damaged checkpoints that were moved aside."""
    return sorted(path.name for path in self.root.glob('*.damaged*'))

  def damage(
    self, step: int, *, share: seals.Share = seals.WHOLE
  ) -> str | None:
    """Returns what is wrong with (a share of) a checkpoint, or None."""
    return seals.damage(self.path(step), share=share)

  def make_room(self, step: int, damaged: Iterable[int]) -> None:
    """Prepares the save of a step: removes leftovers, moves damage aside.

    Args:
      step: that will be written.
      damaged: steps of checkpoints to move aside.

    Raises:
      OSError: the directory cannot be written.
    """
    self.root.mkdir(parents=True, exist_ok=True)
    self.remove_leftovers()
    self._move_aside(damaged)
    # Whether it can be written is found out here: processes of orbax wait for
    # one that fails. It is gone again, as one removes what others look for.
    self.writing_path(step).mkdir()
    self.writing_path(step).rmdir()

  def remove_leftovers(self) -> None:
    """Frees the space of killed and failed saves, as far as possible.

    Only for the process that writes, and while no save is under way.
    """
    for pattern in _LEFTOVERS:
      for path in self.root.glob(pattern):
        shutil.rmtree(path, ignore_errors=True)

  def _move_aside(self, steps: Iterable[int]) -> None:
    """Renames damaged checkpoints to the first free `<step>.damaged<n>`."""
    for step in steps:
      names = (f'{step}.damaged{n or ""}' for n in itertools.count())
      free = (self.root / n for n in names if not (self.root / n).exists())
      if self.path(step).is_dir():
        os.rename(self.path(step), next(free))

  def publish(
    self, step: int, files: dict[str, dict[str, Any]] | None = None
  ) -> None:
    """Seals what was written for a step and makes it a checkpoint.

    Args:
      step: whose files are all written.
      files: see `seals.seal`.

    Raises:
      OSError: a file cannot be written or renamed; nothing is published.
    """
    seals.seal(self.writing_path(step), files)
    os.rename(self.writing_path(step), self.path(step))
    seals.flush_directory(self.root)

  def delete_old(self, config: config_lib.CheckpointConfig) -> None:
    """Deletes what the configuration does not keep.

    One whose files are missing or of another size is neither counted among
    those kept nor deleted. A failure is one warning.
    """
    whole = [
      step
      for step in self.steps()
      if seals.damage(self.path(step), read_contents=False) is None
    ]
    every = config.keep_every_steps
    for step in whole[config.keep_latest :]:
      if not every or step % every:
        self._delete(step)

  def _delete(self, step: int) -> None:
    # A reader sees a whole checkpoint or none, never one half deleted.
    leaving = self.root / f'{step}.deleting'
    try:
      os.rename(self.path(step), leaving)
      shutil.rmtree(leaving)
    except OSError as error:
      logging.warning('deleting checkpoint %d failed: %s', step, error)


def _is_step(name: str) -> bool:
  return name.isascii() and name.isdigit() and str(int(name)) == name
