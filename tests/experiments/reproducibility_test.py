import json
import subprocess

import pytest

from experiments import reproducibility

pytestmark = pytest.mark.usefixtures('standard_promotion')

RUN = reproducibility.Run(
  steps=2, model_width=32, num_layers=1, batch=1, length=64
)
COMMAND = ('program', '--train')


def _child(losses, parameters):
  return {
    'losses': [x.hex() for x in losses],
    'parameters': parameters,
    'device': '1 x cpu',
  }


def test_two_runs_on_one_machine_agree_in_every_bit():
  first, second = reproducibility.train(RUN), reproducibility.train(RUN)
  row = reproducibility.compare('default', RUN, first, second)
  assert row['losses_equal'] and row['parameters_equal']
  assert row['first_different_step'] is None
  assert len(first['losses']) == 2 and first['losses'][0] != first['losses'][1]
  assert row['commit'] and row['versions'] and 'losses' not in row


def test_a_bit_that_differs_is_found():
  first = _child([1.0, 2.0, 3.0], 'a')
  second = _child([1.0, 2.0000001, 3.0], 'b')
  row = reproducibility.compare('default', RUN, first, second)
  assert not row['losses_equal'] and not row['parameters_equal']
  assert row['first_different_step'] == 1
  line = reproducibility.format_row(row)
  assert line.startswith('default: losses different, parameters different')


def test_each_run_is_a_process_with_its_flags(monkeypatch):
  started = []

  def run(command, env, **unused_options):
    started.append((command[2:], env['XLA_FLAGS']))
    output = f'a line\n{json.dumps(_child([1.0], "a"))}\n'
    return subprocess.CompletedProcess(command, 0, output, '')

  monkeypatch.setenv('XLA_FLAGS', '--given')
  monkeypatch.setattr(subprocess, 'run', run)
  settings = ['default', 'deterministic']
  rows = list(reproducibility.rows(RUN, settings, COMMAND))
  assert [row['setting'] for row in rows] == settings
  assert [flags for _, flags in started] == [
    '--given',
    '--given',
    '--given --xla_gpu_deterministic_ops=true',
    '--given --xla_gpu_deterministic_ops=true',
  ]
  assert started[0][0][:2] == list(COMMAND)
  assert '--length=64' in started[0][0]


def test_a_run_that_fails_says_why(monkeypatch):
  def run(command, **unused_options):
    return subprocess.CompletedProcess(command, 1, '', 'no memory')

  monkeypatch.setattr(subprocess, 'run', run)
  with pytest.raises(RuntimeError, match='a run failed .*no memory'):
    next(reproducibility.rows(RUN, ['default'], COMMAND))


def test_unknown_settings_and_sizes_are_refused():
  with pytest.raises(ValueError, match=r"got \['fast'\]"):
    next(reproducibility.rows(RUN, ['fast'], COMMAND))
  with pytest.raises(ValueError, match='steps must be at least 1, got 0'):
    reproducibility.Run(steps=0)
