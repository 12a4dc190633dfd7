import subprocess
import sys

import pytest

from experiments.training import restart
from experiments.training import watchdog as watchdog_lib

_STEPS = """
import ctypes, pathlib, sys, threading
from experiments.training import watchdog

def sleep():
  threading.Event().wait()

def hold_the_lock_of_python():
  ctypes.PyDLL(None).sleep(60)

watchdog._GRACE_SECONDS = 0.1
with watchdog.Watchdog(0.2, pathlib.Path(sys.argv[1])) as dog:
  for _ in range(3):
    dog.beat()
  print('hangs', flush=True)
  globals()[sys.argv[2]]()
"""


def run(*arguments) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-c', _STEPS, *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=50,
  )


def test_a_hung_step_ends_with_one_line_and_all_stacks(tmp_path):
  stacks = tmp_path / 'stacks.txt'
  result = run(stacks, 'sleep')
  assert result.returncode == restart.EXIT_CODE == 75
  assert result.stdout == 'hangs\n'
  (line,) = result.stderr.splitlines()
  assert line == (
    'error: no step was done for 0.2 s (--watchdog_seconds), the stacks of all '
    f'threads are in {stacks}; exit 75: the same command resumes'
  )
  text = stacks.read_text()
  assert 'in sleep' in text
  assert 'in _watch' in text
  assert text.count('most recent call first') == 2


def test_stacks_that_cannot_be_written_are_shown(tmp_path):
  result = run(tmp_path / 'absent' / 'stacks.txt', 'sleep')
  assert result.returncode == 75
  assert 'in sleep' in result.stderr
  assert 'are in the error stream' in result.stderr.splitlines()[-1]


def test_code_that_keeps_python_from_running_is_ended_too(tmp_path):
  result = run(tmp_path / 'stacks.txt', 'hold_the_lock_of_python')
  assert result.returncode == 1
  assert 'in hold_the_lock_of_python' in result.stderr


@pytest.fixture
def clock(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(watchdog_lib.time, 'monotonic', lambda: now[0])
  return now


def test_the_first_step_may_take_three_times_as_long(tmp_path, clock):
  dog = watchdog_lib.Watchdog(600, tmp_path / 'stacks.txt')
  deadlines = []
  for moment in (0.0, 1000.0, 2000.0, 2001.0):
    clock[0] = moment
    dog.beat()
    deadlines.append(dog._deadline - moment)
  assert deadlines == [1800, 1800, 600, 600]
  dog.pause()
  assert dog._deadline is None


def test_zero_watches_nothing(tmp_path):
  with watchdog_lib.Watchdog(0, tmp_path / 'stacks.txt') as dog:
    dog.beat()
    assert dog._deadline is None


def test_after_the_context_nothing_is_expected(tmp_path):
  with watchdog_lib.Watchdog(60, tmp_path / 'stacks.txt') as dog:
    dog.beat()
  dog.beat()
  assert dog._deadline is None
