import subprocess
import sys

import pytest

from experiments import config as config_lib
from experiments.training import processes
from tests.experiments import tiny_run

_PROCESS = """
import sys, time
from experiments import config as config_lib
from experiments.training import processes

scenario, index, port, directory = sys.argv[1:]
index = int(index)
runtime = config_lib.RuntimeConfig(
  coordinator_address=f'127.0.0.1:{port}', num_processes=2, process_id=index,
  peer_timeout_seconds=60,
)
with processes.joined(runtime, directory, one_line=(ValueError,)) as group:
  assert group.count == 2 and group.index == index
  if scenario == 'talk':
    for i in range(5):
      values = group.gather('name', f'{index} {i}')
      assert values == [f'0 {i}', f'1 {i}'], values
      assert group.share('value', lambda: {'made': index, 'round': i}) == {
        'made': 0, 'round': i
      }
    group.gather('a barrier')
    left = processes.client().key_value_dir_get('name/')
    assert sorted(key for key, _ in left) == [
      'name/3/0', 'name/3/1', 'name/4/0', 'name/4/1'
    ], left
    assert processes.try_get('absent') is None
    group.gather('another barrier')
    processes.set_once('once', str(index))
    group.gather('a third')
    assert processes.try_get('once') in '01'
    print('talked')
  group.timeout = 0.6
  if scenario == 'silent' and index == 0:
    group.gather('a thing', '')
  if scenario == 'silent' and index == 1:
    time.sleep(3)
  if scenario == 'idle':
    group.share('a long thing', lambda: time.sleep(3))
  if scenario == 'fails' and index == 0:
    raise ValueError('the disk\\nis on fire')
  if scenario == 'fails' and index == 1:
    group.timeout = 30
    group.gather('a thing', '')
"""


def run(scenario, directory):
  """Runs a scenario in two processes; returns what each left."""
  port = str(tiny_run.free_port())
  started = [
    subprocess.Popen(
      [sys.executable, '-c', _PROCESS, scenario, str(i), port, str(directory)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  return [tiny_run.finish(process) for process in started]


def test_they_agree_and_end_together(tmp_path):
  for result in run('talk', tmp_path):
    assert result.returncode == 0, result.stderr
    assert result.stdout == 'talked\n'
    assert result.stderr == ''


def test_one_that_fails_ends_the_others_with_its_reason(tmp_path):
  first, second = run('fails', tmp_path)
  assert first.returncode == second.returncode == 1
  assert first.stderr == 'error: process 0: the disk is on fire\n'
  assert second.stderr == (
    'error: process 1: process 0 failed: the disk is on fire\n'
  )


@pytest.mark.parametrize(
  ('scenario', 'waiting', 'message'),
  [
    ('silent', 0, "of 2 processes 1 did not come to 'a thing' within 0.6 s"),
    ('idle', 1, "process 0 was waited for 0.6 s to finish 'a long thing'"),
  ],
)
def test_one_that_is_waited_for_in_vain_is_named(
  tmp_path, scenario, waiting, message
):
  result = run(scenario, tmp_path)[waiting]
  assert result.returncode == 75
  (line,) = result.stderr.splitlines()
  assert line.startswith(f'error: process {waiting}: lost a peer: {message}')


def test_alone_there_is_nobody_to_wait_for():
  group = processes.Group()
  assert group.is_primary
  assert group.gather('a', 'x') == ['x']
  assert group.share('b', lambda: 3) == 3
  group.show_life()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_processes': -1}, 'num_processes must be at least 0'),
    ({'num_processes': 2, 'process_id': 2}, 'process_id must be below'),
    ({'peer_timeout_seconds': 0}, 'peer_timeout_seconds must be at least 1'),
    ({'watchdog_seconds': -1.0}, 'watchdog_seconds must be at least 0'),
  ],
)
def test_impossible_processes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    config_lib.RuntimeConfig(**changes)


def test_half_of_what_is_needed_is_refused(monkeypatch):
  def find_nothing(**unused_options):
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(processes.jax.distributed, 'initialize', find_nothing)
  runtime = config_lib.RuntimeConfig(num_processes=2, process_id=0)
  with pytest.raises(ValueError, match='--coordinator_address'):
    processes._initialize(runtime)
  processes._initialize(config_lib.RuntimeConfig())  # Alone.
