"""The program from its flags to its row, and the same command again."""

import json
import os
import subprocess
import sys


def _run(cache, *options):
  command = [sys.executable, '-m', 'experiments.train_synthetic', *options]
  return subprocess.run(
    command,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
    env=os.environ
    | {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(cache)},
  )


def test_a_run_leaves_a_row_and_is_not_run_again(tmp_path, compilation_cache):
  output = tmp_path / 'deep' / 'rows.jsonl'
  options = (
    '--task=parity',
    '--protocol=clean',
    '--training.num_train=16',
    '--training.num_test=8',
    '--training.batch_size=8',
    '--training.num_epochs=1',
    f'--output={output}',
  )
  first = _run(compilation_cache, *options)
  assert first.returncode == 0, first.stderr
  (row,) = map(json.loads, output.read_text().splitlines())
  assert (row['name'], row['mixer'], row['epochs']) == (
    'parity',
    'delta_net',
    1,
  )
  assert 0 <= row['accuracy'] <= 1
  assert row['config']['protocol'] == 'clean'
  assert row['config']['training']['num_train'] == 16
  assert 'parity' in first.stdout and 'sequence accuracy' in first.stdout
  before = output.read_bytes()
  again = _run(compilation_cache, *options)
  assert again.returncode == 0, again.stderr
  assert '1 runs, 1 of them done' in again.stderr
  assert again.stdout == first.stdout and output.read_bytes() == before


def test_an_unknown_mixer_is_refused_in_one_line(tmp_path, compilation_cache):
  result = _run(
    compilation_cache,
    '--task=regbench',
    '--mixer=memory',
    f'--output={tmp_path / "rows.jsonl"}',
  )
  assert result.returncode == 1
  assert 'error: mixer must be one of' in result.stderr
  assert "got ['memory']" in result.stderr
  assert 'Traceback' not in result.stderr
