import subprocess
import sys

import pytest

from experiments.training import native_log

FATAL = 'F1126 Terminating process because the JAX distributed service '
FATAL += 'detected fatal errors.'


@pytest.mark.parametrize(
  ('text', 'line'),
  [
    (
      f'tasks are unhealthy (stopped sending heartbeats):\n1\n7\nThe\n{FATAL}',
      'lost process 1, 7, which is silent',
    ),
    (
      f'{FATAL}\nRPC: /xla.coordination.CoordinationService/RegisterTask',
      'the other processes did not start in time',
    ),
    (
      f'{FATAL}\nRPC: /xla.coordination.CoordinationService/PollForError',
      'lost process 0, which is gone or cannot be reached',
    ),
  ],
)
def test_the_last_words_name_who_is_gone(text, line):
  assert native_log._explain(text) == line


_ABORT = """
import os, pathlib, sys
from absl import logging
from experiments.training import native_log

logging.use_absl_handler()
with native_log.redirected(pathlib.Path(sys.argv[1])) as log:
  os.write(2, b'before\\n')
  if sys.argv[2] != 'unnamed':
    log.name(3)
  os.write(2, sys.argv[3].encode() + b'\\n')
  print('of python', file=sys.stderr)
  logging.error('of absl')
  if sys.argv[2] != 'calm':
    os.abort()
os.write(2, b'after\\n')
"""


def run(*arguments) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-c', _ABORT, *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_an_abort_for_a_lost_peer_is_one_line_and_75(tmp_path):
  result = run(tmp_path / 'run', 'abort', FATAL)
  path = tmp_path / 'run' / 'native_3.log'
  assert path.read_text() == f'before\n{FATAL}\n'
  assert result.returncode == 75
  lines = result.stderr.splitlines()
  assert 'of python' in lines
  assert 'of absl' in lines[-2]
  assert lines[-1] == (
    'error: process 3: lost process 0, which is gone or cannot be reached '
    f'(more in {path}); exit 75: the same command resumes'
  )


def test_an_abort_before_there_is_a_name(tmp_path):
  result = run(tmp_path / 'run', 'unnamed', f'{FATAL} RegisterTask')
  assert result.returncode == 75
  assert 'the other processes did not start in time' in result.stderr
  assert not (tmp_path / 'run').exists()


def test_another_abort_stays_one(tmp_path):
  result = run(tmp_path, 'abort', 'Check failed: x')
  assert result.returncode == -6
  assert 'native code aborted (more in ' in result.stderr


def test_without_an_abort_the_stream_returns(tmp_path):
  result = run(tmp_path, 'calm', 'native')
  assert result.returncode == 0
  assert (tmp_path / 'native_3.log').read_text() == 'before\nnative\n'
  assert result.stderr.splitlines()[-1] == 'after'
  assert 'native' not in result.stderr
