"""Looks at what failed saves leave in the directory of the checkpoints."""

import errno
import os

import jax.numpy as jnp
import pytest

from experiments import config as config_lib
from experiments.training import checkpoints

STATE = {'w': jnp.zeros(3)}


class FullDisk:
  """A save under way that fails; what it wrote goes on appearing."""

  def __init__(self, saver, step, state, metadata):
    del state, metadata
    self._directory = saver._files.writing_path(step)
    self.write()

  def write(self):
    (self._directory / 'state').mkdir(parents=True, exist_ok=True)

  def result(self):
    raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.fixture
def saver(tmp_path):
  """Of a directory that holds step 1."""
  saver = checkpoints.Checkpoints(tmp_path, config_lib.CheckpointConfig())
  assert saver.save(1, STATE, {})
  saver.wait()
  yield saver
  saver.close()


@pytest.fixture
def failed(saver, monkeypatch):
  """The save of step 2, which has failed."""
  started = []

  def fail(*args):
    started.append(FullDisk(*args))
    return started[-1]

  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.Checkpoints, '_write', fail)
    assert saver.save(2, STATE, {})
    with pytest.raises(checkpoints.SaveFailedError, match='No space left'):
      saver.wait()
  return started[0]


def test_what_it_wrote_is_removed_at_once(tmp_path, failed):
  assert os.listdir(tmp_path) == ['1']


def test_what_appears_afterwards_is_removed_by_the_next_save(
  tmp_path, saver, failed
):
  failed.write()  # A thread of orbax that had not heard of the failure.
  assert saver.save(3, STATE, {})
  saver.wait()
  assert sorted(os.listdir(tmp_path)) == ['1', '3']


def test_what_appears_afterwards_is_removed_at_the_end(tmp_path, saver, failed):
  failed.write()
  saver.close()
  assert os.listdir(tmp_path) == ['1']


def test_a_reader_leaves_the_save_of_another_alone(tmp_path, saver):
  (tmp_path / '2.writing').mkdir()
  with checkpoints.Checkpoints(
    tmp_path, config_lib.CheckpointConfig()
  ) as reader:
    assert reader.read_meta() == {}
  assert sorted(os.listdir(tmp_path)) == ['1', '2.writing']
