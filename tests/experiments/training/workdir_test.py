import json
import os
import signal
import subprocess
import sys

from absl import logging
import pytest

from deltanet_jax import config as model_config
from experiments import config as train_config
from experiments.training import workdir as workdir_lib


def _identity(**changes):
  training = train_config.TrainingConfig(**changes)
  config = train_config.TrainLMConfig(
    model=model_config.ModelConfig(), training=training
  )
  return {
    'config': train_config.to_dict(config),
    'corpus': 'a1',
    'tokenizer': 'b2',
    'versions': {'jax': '0.12.0'},
    'commit': 'c3',
    'device': '1 x cpu',
  }


@pytest.fixture
def workdir(tmp_path):
  with workdir_lib.locked(tmp_path / 'run') as files:
    yield files


def test_the_first_start_writes_its_identity(workdir):
  assert workdir_lib.claim(workdir, _identity()) == []
  assert json.loads(workdir.config.read_text()) == _identity()
  assert workdir_lib.claim(workdir, _identity()) == []


def test_an_identity_is_written_whole_or_not_at_all(workdir, monkeypatch):
  def fail(*unused_args):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    workdir_lib.claim(workdir, _identity())
  assert not workdir.config.exists()


def test_another_run_is_refused_with_every_difference(workdir):
  workdir_lib.claim(workdir, _identity())
  other = _identity(seed=7, num_steps=2000) | {'corpus': 'a9'}
  with pytest.raises(workdir_lib.WorkdirMismatchError) as error:
    workdir_lib.claim(workdir, other)
  lines = str(error.value).splitlines()
  assert lines[1:-1] == [
    '  config.training.num_steps: 1000 != 2000',
    '  config.training.seed: 0 != 7',
    '  corpus: "a1" != "a9"',
  ]
  assert json.loads(workdir.config.read_text()) == _identity()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'tokenizer': 'b3'}, 'tokenizer: "b2" != "b3"'),
    ({'new': 1}, r'new: \(absent\) != 1'),
    ({'config': {}}, r'config.training.seed: 0 != \(absent\)'),
  ],
)
def test_any_other_part_that_differs_is_refused(workdir, change, message):
  workdir_lib.claim(workdir, _identity())
  with pytest.raises(workdir_lib.WorkdirMismatchError, match=message):
    workdir_lib.claim(workdir, _identity() | change)


def test_a_number_may_be_written_as_int_or_float(workdir):
  workdir_lib.claim(workdir, {'config': {'weight_decay': 0}})
  assert workdir_lib.claim(workdir, {'config': {'weight_decay': 0.0}}) == []
  assert json.loads(workdir.config.read_text())['config']['weight_decay'] == 0


def test_free_fields_exist_and_may_change(workdir):
  workdir_lib.claim(workdir, _identity())
  assert workdir_lib.claim(workdir, _identity(log_every_steps=3)) == []
  for path in workdir_lib.FREE_FIELDS:
    value = _identity()
    for name in path.split('.'):
      value = value[name]
    assert isinstance(value, int)


def test_another_environment_is_one_warning_a_line(workdir, monkeypatch):
  logged = []
  monkeypatch.setattr(logging, 'warning', lambda *args: logged.append(args))
  workdir_lib.claim(workdir, _identity())
  changes = {'versions': {'jax': '0.13.0'}, 'device': '2 x cpu'}
  assert workdir_lib.claim(workdir, _identity() | changes) == [
    'versions.jax: "0.12.0" != "0.13.0"',
    'device: "1 x cpu" != "2 x cpu"',
  ]
  assert len(logged) == 2


@pytest.mark.parametrize('text', ['{"config": ', '[]'])
def test_an_unreadable_identity_is_refused_and_kept(workdir, text):
  workdir.config.write_text(text)
  with pytest.raises(workdir_lib.WorkdirMismatchError, match='config.json'):
    workdir_lib.claim(workdir, _identity())
  assert workdir.config.read_text() == text


@pytest.mark.parametrize('name', ['checkpoints', 'metrics.jsonl'])
def test_files_of_an_unknown_run_are_refused(workdir, name):
  (workdir.root / name).mkdir()
  with pytest.raises(workdir_lib.WorkdirMismatchError, match='no config.json'):
    workdir_lib.claim(workdir, _identity())


def test_a_number_that_is_not_finite_is_refused(workdir):
  with pytest.raises(ValueError, match='JSON'):
    workdir_lib.claim(workdir, {'config': {'x': float('nan')}})
  assert not workdir.config.exists()


def test_no_two_runs_hold_one_directory(workdir):
  with pytest.raises(workdir_lib.WorkdirBusyError, match=str(os.getpid())):
    with workdir_lib.locked(workdir.root):
      pass


def test_the_lock_ends_with_the_context(tmp_path):
  held = []
  for _ in range(2):
    with workdir_lib.locked(tmp_path) as workdir:
      held.append(workdir.root)
  assert held == [tmp_path, tmp_path]


def test_the_lock_ends_with_a_killed_process(tmp_path):
  program = (
    'import sys, time\n'
    'from experiments.training import workdir\n'
    'with workdir.locked(sys.argv[1]):\n'
    '  print("held", flush=True)\n'
    '  time.sleep(60)\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', program, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == 'held\n'
    with pytest.raises(workdir_lib.WorkdirBusyError, match=str(process.pid)):
      with workdir_lib.locked(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
  with workdir_lib.locked(tmp_path) as workdir:
    assert (workdir.root / '.lock').read_text() == str(os.getpid())


def test_every_file_has_its_own_path(workdir):
  names = [
    name
    for name, value in vars(workdir_lib.Workdir).items()
    if isinstance(value, property)
  ]
  paths = {getattr(workdir, name) for name in names}
  assert len(paths) == len(names) == 11
  assert {path.parent for path in paths} == {workdir.root}
