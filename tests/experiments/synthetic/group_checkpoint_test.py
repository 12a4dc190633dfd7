"""Tests that a group of runs goes on where it was, and that damage is found."""

import dataclasses
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.synthetic import config as config_lib
from experiments.synthetic import group_checkpoint
from experiments.synthetic import sweeping
from experiments.synthetic import training
from tests.experiments.synthetic import tiny_mqar

pytestmark = pytest.mark.usefixtures('standard_promotion')


def _run(rate: float) -> config_lib.RunConfig:
  run = tiny_mqar.with_training(num_train=256, num_epochs=3, learning_rate=rate)
  return dataclasses.replace(run, block=_DROPOUT)


_DROPOUT = config_lib.BlockConfig(embedding_dropout=0.1)
RUNS = [_run(2e-2), _run(1e-2)]


class Killed(Exception):
  """Ends a run as a kill would."""


def _kill_after(epochs):
  def on_epoch(epoch, histories):
    del histories
    if epoch == epochs:
      raise Killed

  return on_epoch


def _without_time(history):
  return dataclasses.replace(history, seconds=[])


@pytest.fixture
def stopped(tmp_path):
  """Returns the checkpoint of a run killed after two of three epochs."""
  path = tmp_path / 'rows.unfinished.npz'
  with pytest.raises(Killed):
    training.train(RUNS, checkpoint=path, on_epoch=_kill_after(2))
  return path


def test_a_killed_group_goes_on_bit_for_bit(stopped):
  epochs = []
  resumed = training.train(
    RUNS, checkpoint=stopped, on_epoch=lambda epoch, _: epochs.append(epoch)
  )
  whole = training.train(RUNS)
  assert epochs == [3]
  for one, other in zip(resumed, whole, strict=True):
    assert _without_time(one) == _without_time(other)
    assert one.seconds == sorted(one.seconds) and len(one.seconds) == 3
  again = training.train(RUNS, checkpoint=stopped, on_epoch=_kill_after(0))
  assert again == resumed


def test_damage_other_runs_and_another_model_are_refused(stopped):
  with pytest.raises(ValueError, match='must be of the runs'):
    training.train(RUNS[:1], checkpoint=stopped)
  with pytest.raises(ValueError, match='another version'):
    group_checkpoint.load(stopped, RUNS, {'a': 1})
  contents = bytearray(stopped.read_bytes())
  contents[len(contents) // 2] ^= 1
  stopped.write_bytes(contents)
  with pytest.raises(ValueError, match='is damaged'):
    training.train(RUNS, checkpoint=stopped)
  stopped.write_bytes(contents[:100])
  with pytest.raises(ValueError, match='is damaged'):
    group_checkpoint.run_keys(stopped)


def test_a_flipped_bit_is_found_or_harmless(tmp_path):
  path = tmp_path / 'file.npz'
  states = {'x': jnp.arange(20.0), 'key': jax.random.key(3)}
  group_checkpoint.save(path, RUNS, states, [training.History(loss=[0.5])])
  contents = path.read_bytes()
  found = 0
  for index in range(len(contents)):
    damaged = bytearray(contents)
    damaged[index] ^= 1 << index % 8
    path.write_bytes(damaged)
    try:
      loaded, histories = group_checkpoint.load(path, RUNS, states)
    except ValueError:
      found += 1
      continue
    np.testing.assert_array_equal(loaded['x'], states['x'])
    assert loaded['key'] == states['key']
    assert histories[0]['loss'] == [0.5]
  assert found > len(contents) // 2


def test_a_leaf_of_another_shape_is_named(tmp_path):
  path = tmp_path / 'file.npz'
  states = training._initial_states(RUNS)
  group_checkpoint.save(path, RUNS, states, [])
  loaded, histories = group_checkpoint.load(path, RUNS, states)
  assert histories == []
  with pytest.raises(ValueError, match=re.escape('must be float32[1')):
    group_checkpoint.load(path, RUNS, jax.tree.map(lambda x: x[:1], loaded))


def test_a_sweep_removes_what_is_finished(stopped):
  output = stopped.with_name('rows.jsonl')
  rows = sweeping.run_all(RUNS, output, most=2, stream=io.StringIO())
  assert [row['epochs'] for row in rows] == [3, 3]
  assert not stopped.exists()
  with pytest.raises(Killed):  # As after a kill between row and removal.
    training.train(RUNS, checkpoint=stopped, on_epoch=_kill_after(1))
  assert sweeping.run_all(RUNS, output, most=2, stream=io.StringIO()) == rows
  assert not stopped.exists()
