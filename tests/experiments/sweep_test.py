"""The programs refuse what they do not know, in one line."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('sweep', '--sweep=all'), 'mqar_cpu'),
    (('train_synthetic', '--task=sums'), 'error: task and config must be one'),
  ],
)
def test_refuses_unknown_names(arguments, message):
  program, *options = arguments
  result = subprocess.run(
    [sys.executable, '-m', f'experiments.{program}', *options],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert result.returncode
  assert message in result.stdout + result.stderr
  assert 'Traceback' not in result.stderr
