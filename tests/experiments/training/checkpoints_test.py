"""Tests of the checkpoints: atomic, sealed, never lost, never wrong."""

import errno
import logging
import multiprocessing
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import config as config_lib
from experiments.training import checkpoints
from experiments.training import seals

CONFIG = config_lib.CheckpointConfig(keep_latest=3)
NUM_FILES = 11  # Of a checkpoint.


def make_state(step: int):
  key = jax.random.key(step)
  params = {
    'a': {'w': jax.random.normal(key, (64, 64)), 'none': {}},
    'b': jnp.full((5,), step, jnp.bfloat16),
  }
  return {
    'params': params,
    'optimizer': optax.adamw(1e-3).init(params),
    'step': jnp.int32(step),
    'key': key,
  }


def make_meta(step: int):
  return {'step': step, 'data': {'next': [step, None, 0.1]}, 'name': 'ü'}


def abstract(state):
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)


def numbers(leaf) -> np.ndarray:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def assert_restored(restored, step: int):
  expected = make_state(step)
  assert restored.step == step
  assert restored.meta == make_meta(step)
  assert jax.tree.structure(restored.state) == jax.tree.structure(expected)
  for found, wanted in zip(
    jax.tree.leaves(restored.state), jax.tree.leaves(expected), strict=True
  ):
    assert found.dtype == wanted.dtype
    assert numbers(found).tobytes() == numbers(wanted).tobytes()


def write(directory, *steps: int, config=CONFIG):
  with checkpoints.Checkpoints(directory, config) as saver:
    saver.restore(abstract(make_state(0)))
    for step in steps:
      assert saver.save(step, make_state(step), make_meta(step))
      saver.wait()


def restore(directory):
  with checkpoints.Checkpoints(directory, CONFIG) as saver:
    return saver.restore(abstract(make_state(0)))


def names(directory) -> set[str]:
  return {path.name for path in pathlib.Path(directory).iterdir()}


def files_of(directory) -> list[pathlib.Path]:
  return sorted(p for p in directory.rglob('*') if p.is_file())


@pytest.fixture
def warnings(caplog):
  caplog.set_level(logging.DEBUG, 'absl')
  return lambda: [r.getMessage() for r in caplog.records]


@pytest.fixture(scope='module')
def two_saved(tmp_path_factory):
  directory = tmp_path_factory.mktemp('saved')
  write(directory, 1, 2)
  return directory


@pytest.fixture
def saved(two_saved, tmp_path):
  return pathlib.Path(shutil.copytree(two_saved, tmp_path / 'copy'))


def test_nothing_there_is_none(tmp_path):
  assert restore(tmp_path / 'new') is None
  assert names(tmp_path) == set()


def test_state_and_meta_return_bit_equal(saved, warnings):
  assert_restored(restore(saved), 2)
  with checkpoints.Checkpoints(saved, CONFIG) as saver:
    assert saver.read_meta() == make_meta(2)
  assert names(saved) == {'1', '2'}
  assert not warnings()


def test_a_state_returns_with_the_shardings_asked_for(tmp_path):
  mesh = jax.make_mesh((8,), ('data',))
  sharding = jax.NamedSharding(mesh, jax.P('data'))
  values = np.arange(32, dtype=np.float32).reshape(16, 2)
  with checkpoints.Checkpoints(tmp_path, CONFIG) as saver:
    saver.save(1, {'w': jax.device_put(values, sharding)}, {})
  half = jax.NamedSharding(
    jax.make_mesh((2,), ('data',), devices=jax.devices()[:2]), jax.P('data')
  )
  for wanted in (sharding, half):
    leaf = jax.ShapeDtypeStruct((16, 2), jnp.float32, sharding=wanted)
    with checkpoints.Checkpoints(tmp_path, CONFIG) as saver:
      found = saver.restore({'w': leaf}).state['w']
    assert found.sharding == wanted
    np.testing.assert_array_equal(found, values)


def test_no_file_is_unpickled(saved, monkeypatch):
  def refuse(*unused_args, **unused_kwargs):
    raise AssertionError('a checkpoint was unpickled')

  for name in ('load', 'loads', 'Unpickler'):
    monkeypatch.setattr(pickle, name, refuse)
  assert_restored(restore(saved), 2)


def test_the_state_may_be_donated_right_after_save(tmp_path):
  negate = jax.jit(
    lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0
  )
  template = {'w': jax.ShapeDtypeStruct((1 << 20,), jnp.float32)}
  with checkpoints.Checkpoints(tmp_path, CONFIG) as saver:
    for step in (1, 2, 3):
      state = {'w': jnp.full(1 << 20, step, jnp.float32)}
      saver.save(step, state, {})
      for _ in range(3):
        state = negate(state)
      state['w'].delete()
      found = saver.restore(template).state
      assert (np.asarray(found['w']) == step).all()


@pytest.mark.parametrize('index', range(NUM_FILES))
@pytest.mark.parametrize('kind', ['flip', 'truncate', 'delete'])
def test_every_damage_falls_back_with_one_line(saved, index, kind, warnings):
  files = files_of(saved / '2')
  assert len(files) == NUM_FILES
  path = files[index]
  contents = bytearray(path.read_bytes())
  if kind == 'delete':
    path.unlink()
  elif not contents:
    path.write_bytes(b'x')
  elif kind == 'truncate':
    path.write_bytes(contents[: len(contents) // 2])
  else:
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
  assert_restored(restore(saved), 1)
  (line,) = warnings()
  assert line.startswith('checkpoint 2 is damaged: ')
  assert path.relative_to(saved / '2').as_posix() in line


def test_a_damaged_one_is_kept_aside_and_its_step_saved_again(saved):
  for _ in range(2):
    files_of(saved / '2')[-1].unlink()
    write(saved, 2)
    assert_restored(restore(saved), 2)
  assert names(saved) == {'1', '2', '2.damaged', '2.damaged1'}


def test_one_damaged_under_way_is_kept_aside_too(saved):
  with checkpoints.Checkpoints(saved, CONFIG) as saver:
    assert saver.save(3, make_state(3), make_meta(3))
    saver.wait()
    files_of(saved / '3')[-1].unlink()
    assert_restored(saver.restore(abstract(make_state(0))), 2)
    assert saver.save(3, make_state(3), make_meta(3))
  assert_restored(restore(saved), 3)
  assert names(saved) == {'1', '2', '3', '3.damaged'}


def test_all_damaged_is_an_error_that_names_each(saved):
  for step in '12':
    (saved / step / seals.MANIFEST).unlink()
  with pytest.raises(checkpoints.CheckpointsDamagedError) as caught:
    restore(saved)
  assert '2: CHECKSUMS.json' in str(caught.value)
  assert '1: CHECKSUMS.json' in str(caught.value)
  assert names(saved) == {'1', '2'}


def test_only_ones_kept_aside_is_an_error(saved):
  shutil.rmtree(saved / '1')
  (saved / '2').rename(saved / '2.damaged')
  with pytest.raises(checkpoints.CheckpointsDamagedError, match='2.damaged'):
    restore(saved)


@pytest.mark.parametrize(
  ('change', 'leaf'),
  [
    (lambda s: s['params'].pop('b'), r"\['params'\]\['b'\] is bfloat16\[5\]"),
    (lambda s: s['params'].pop('a'), r"\['a'\]\['none'\] is empty"),
    (lambda s: s.update(new=jnp.zeros(1)), r"\['new'\] is missing"),
    (lambda s: s.update(step=jnp.float32(0)), r"\['step'\] is int32\[\]"),
    (lambda s: s.update(step=jnp.zeros(1, int)), r"\['step'\] is int32\[\]"),
    (lambda s: s.update(key=jax.random.key(0, impl='rbg')), r"\['key'\] is"),
    (
      lambda s: s.update(optimizer=optax.sgd(1.0, 0.9).init(s['params'])),
      r"\['optimizer'\]\[0\].trace",
    ),
  ],
)
def test_another_tree_is_refused_by_its_first_leaf(two_saved, change, leaf):
  wanted = make_state(0)
  change(wanted)
  with checkpoints.Checkpoints(two_saved, CONFIG) as saver:
    with pytest.raises(ValueError, match=leaf):
      saver.restore(abstract(wanted))


def test_the_newest_and_the_multiples_are_kept(tmp_path):
  config = config_lib.CheckpointConfig(keep_latest=2, keep_every_steps=4)
  write(tmp_path, *range(1, 8), config=config)
  assert names(tmp_path) == {'4', '6', '7'}


def test_a_damaged_one_does_not_count_among_the_newest(tmp_path):
  config = config_lib.CheckpointConfig(keep_latest=2)
  with checkpoints.Checkpoints(tmp_path, config) as saver:
    for step in (1, 2, 3):
      saver.save(step, make_state(step), make_meta(step))
      saver.wait()
      if step == 2:
        files_of(tmp_path / '2')[-1].unlink()
  assert names(tmp_path) == {'1', '2', '3'}


def test_leftovers_are_no_checkpoints_and_the_next_save_removes_them(saved):
  (saved / '1').rename(saved / '1.deleting')
  (saved / '2').rename(saved / '2.writing')
  (saved / '3.writing.orbax-checkpoint-tmp').mkdir()
  assert restore(saved) is None
  assert len(names(saved)) == 3
  write(saved, 2)
  assert names(saved) == {'2'}


def test_a_step_is_saved_once(tmp_path):
  with checkpoints.Checkpoints(tmp_path, CONFIG) as saver:
    assert saver.save(1, make_state(1), make_meta(1))
    assert not saver.save(1, make_state(1), make_meta(1))
    assert_restored(saver.restore(abstract(make_state(0))), 1)
    assert not saver.save(1, make_state(1), make_meta(1))


def test_a_step_not_above_those_present_is_refused(saved):
  with checkpoints.Checkpoints(saved, CONFIG) as saver:
    for step in (1, 2):
      with pytest.raises(ValueError, match=f'got {step}'):
        saver.save(step, make_state(9), make_meta(9))
  assert_restored(restore(saved), 2)


def test_what_cannot_be_restored_is_refused(tmp_path):
  with checkpoints.Checkpoints(tmp_path, CONFIG) as saver:
    for meta in ({'a': (1, 2)}, {1: 2}, {'a': float('nan')}, {'a': {1}}):
      with pytest.raises(ValueError, match='JSON'):
        saver.save(1, make_state(1), meta)
    with pytest.raises(ValueError, match=r"\['lr'\] is a float"):
      saver.save(1, {'lr': 0.1}, {})


def test_a_directory_that_cannot_be_written(tmp_path, warnings):
  blocked = tmp_path / 'file'
  blocked.touch()
  config = config_lib.CheckpointConfig(max_failed_saves=3)
  with pytest.raises(checkpoints.SaveFailedError, match='the last save'):
    with checkpoints.Checkpoints(blocked, config) as saver:
      for step in (1, 2):
        assert not saver.save(step, make_state(step), make_meta(step))
      with pytest.raises(checkpoints.SaveFailedError, match='3 saves in a row'):
        saver.save(3, make_state(3), make_meta(3))
  assert len(warnings()) == 3


_FULL_DISK = """
import logging, resource, signal, sys
from absl import logging as absl_logging
from experiments.training import checkpoints
from tests.experiments.training import checkpoints_test as lib

logging.basicConfig()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def limit(size):
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

with checkpoints.Checkpoints(sys.argv[1], lib.CONFIG) as saver:
  for step, size in ((1, -1), (2, 10_000), (3, 10_000), (4, -1)):
    limit(size)
    saver.save(step, lib.make_state(step), lib.make_meta(step))
    try:
      saver.wait()
    except checkpoints.SaveFailedError:
      print('failed', step, flush=True)
      lib.assert_restored(saver.restore(lib.abstract(lib.make_state(0))), 1)
"""


def run_python(source: str, *arguments) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-c', source, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_a_full_disk_costs_one_line_and_the_run_goes_on(tmp_path):
  with run_python(_FULL_DISK, tmp_path) as process:
    output, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  assert output == 'failed 2\nfailed 3\n'
  lines = errors.splitlines()
  assert len(lines) == 2, errors
  assert 'saving checkpoint 2 failed, the run goes on' in lines[0]
  assert names(tmp_path) == {'1', '4'}
  assert_restored(restore(tmp_path), 4)


def save_without_pause(directory, begun):
  with checkpoints.Checkpoints(directory, CONFIG) as saver:
    restored = saver.restore(abstract(make_state(0)))
    step = restored.step if restored else 0
    while True:
      step += 1
      saver.save(step, make_state(step), make_meta(step))
      begun.release()


def test_killed_at_any_moment_the_newest_is_whole(tmp_path):
  # The server imports once; each process it forks starts a jax of its own.
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload([save_without_pause.__module__])
  moments = random.Random(0)
  last = 0
  for _ in range(5):
    begun = context.Semaphore(0)
    process = context.Process(target=save_without_pause, args=(tmp_path, begun))
    process.start()
    for _ in range(3):  # Of which two are on the disk, however slow it is.
      assert begun.acquire(timeout=60)
    time.sleep(moments.uniform(0, 0.4))
    process.kill()
    process.join()
    restored = restore(tmp_path)
    assert_restored(restored, restored.step)
    assert restored.step >= last + 2
    last = restored.step


def test_a_seal_that_cannot_be_written_is_a_failed_save(saved, monkeypatch):
  def fail(directory, files):
    del files
    raise OSError(errno.ENOSPC, 'No space left on device', str(directory))

  with checkpoints.Checkpoints(saved, CONFIG) as saver:
    monkeypatch.setattr(seals, 'seal', fail)
    assert saver.save(3, make_state(3), make_meta(3))
    with pytest.raises(checkpoints.SaveFailedError, match='No space left'):
      saver.wait()
    assert names(saved) == {'1', '2'}
    monkeypatch.undo()
    assert saver.save(3, make_state(3), make_meta(3))
  assert_restored(restore(saved), 3)
