import json
import re

import pytest

from experiments.data import store_meta
from experiments.training import metrics
from experiments.training import workdir as workdir_lib
from tests.experiments import tiny_run


def test_a_run_ends_with_what_it_achieved(finished_run):
  *_, bits, baselines = finished_run.result.stdout.splitlines()
  assert re.fullmatch(r'held-out bits/byte \d\.\d{3}', bits)
  number = r'\d\.\d{3}'
  assert re.fullmatch(
    f'on the same bytes: order-2 n-gram {number}, zlib {number}, xz {number}',
    baselines,
  )
  assert 'sample:\ndef ' in finished_run.result.stdout
  assert 'Traceback' not in finished_run.result.stderr


def test_a_run_leaves_its_files(finished_run):
  workdir = workdir_lib.Workdir(finished_run.root)
  names = {path.name for path in workdir.root.iterdir()}
  assert names == {
    '.lock',
    'checkpoints',
    'clock.json',
    'config.json',
    'log.txt',
    'loss.png',
    'metrics.jsonl',
    'report.json',
    'samples.txt',
    'tensorboard',
    'tokens',
  }
  assert {path.name for path in workdir.checkpoints.iterdir()} == {
    '40',
    '50',
    '60',
  }
  assert workdir.samples.read_text().startswith('def ')
  assert workdir.loss_figure.read_bytes().startswith(b'\x89PNG')
  assert list(workdir.tensorboard.iterdir())


def test_the_report_says_what_the_last_line_says(finished_run):
  workdir = workdir_lib.Workdir(finished_run.root)
  report = json.loads(workdir.report.read_text())
  bits = report['held_out_bits_per_byte']
  assert f'held-out bits/byte {bits:.3f}' in finished_run.result.stdout
  last = metrics.read_rows(workdir.metrics)[-1]
  assert (last['kind'], last['step']) == ('eval', tiny_run.NUM_STEPS)
  assert last['bits_per_byte'] == report['validation_bits_per_byte'] != bits
  # A whole evaluation predicts every byte of its text.
  meta = store_meta.read(workdir.tokens)
  assert last['tokens'] == meta.splits['validation'].num_bytes
  assert report['held_out_tokens'] == meta.splits['test'].num_bytes
  assert report['held_out_bytes'] == meta.splits['test'].num_bytes


@pytest.mark.parametrize(
  ('flag', 'line'),
  [
    (
      '--model.num_layer=4',
      "Unknown command line flag 'model.num_layer'. "
      'Did you mean: model.num_layers ?',
    ),
    (
      '--data.batch_size=0',
      'error: data.batch_size must be at least 1, got 0 '
      '(flags given: --data.batch_size=0)',
    ),
    ('--config=desktop', '--config=desktop: value should be one of <laptop|'),
    ('--training.num_steps=many', 'many'),
  ],
)
def test_a_wrong_flag_is_one_line(tmp_path, compilation_cache, flag, line):
  root = tmp_path / 'run'
  command = [*tiny_run.program('train_lm'), f'--workdir={root}', flag]
  result = tiny_run.finish(tiny_run.start(command, compilation_cache))
  assert result.returncode == 1
  assert line in result.stderr
  assert 'Traceback' not in result.stderr
  assert not root.exists()
