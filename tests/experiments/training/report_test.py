import json

import pytest

from experiments import text_generation
from experiments.data import token_store
from experiments.evaluation import text_baselines
from experiments.training import report as report_lib
from experiments.training import workdir as workdir_lib

pytestmark = pytest.mark.usefixtures('standard_promotion', 'cached_compilation')

REPORT = {
  'step': 7,
  'held_out_bits_per_byte': 1.23456,
  'baselines': {'order_2': 2.5, 'zlib': 3.0, 'xz': 2.75},
  'sample': 'def f',
}


def test_what_a_person_reads(tmp_path):
  workdir = workdir_lib.Workdir(tmp_path)
  assert report_lib.describe(REPORT, workdir).splitlines() == [
    'sample:',
    'def f',
    '',
    f'plot        {tmp_path}/loss.png',
    f'metrics     {tmp_path}/metrics.jsonl',
    f'checkpoint  {tmp_path}/checkpoints/7',
    'held-out bits/byte 1.235',
    'on the same bytes: order-2 n-gram 2.500, zlib 3.000, xz 2.750',
  ]


def test_without_baselines_nothing_is_compared(tmp_path):
  said = report_lib.describe(
    REPORT | {'baselines': {}}, workdir_lib.Workdir(tmp_path)
  )
  assert said.endswith('held-out bits/byte 1.235')


def test_a_run_without_a_report_is_not_finished(tmp_path):
  assert report_lib.read(workdir_lib.Workdir(tmp_path)) is None


def test_the_report_adds_up_and_comes_out_the_same_again(
  finished_run, tmp_path, monkeypatch
):
  old = json.loads((finished_run.root / 'report.json').read_text())
  # 60 steps of 2 x 32 predictions, less padding and the first of documents.
  assert 3500 < old['training_tokens'] < 60 * 2 * 32
  assert old['training_seconds'] > 0
  assert sorted(old['baselines']) == ['order_2', 'xz', 'zlib']

  def measure(*unused_args):
    raise ValueError('the tokenizer is not exact')

  monkeypatch.setattr(text_baselines, 'measure', measure)
  workdir = workdir_lib.Workdir(tmp_path)
  metrics = finished_run.root / 'metrics.jsonl'
  workdir.metrics.write_bytes(metrics.read_bytes())
  report = report_lib.write(
    finished_run.config,
    text_generation.load(finished_run.root).params,
    token_store.TokenStore.open(finished_run.root / 'tokens'),
    workdir,
    {part: old[part] for part in workdir_lib.WARNED_PARTS},
  )
  assert old['commit'] and old['device'] and old['versions']['jax']
  assert report == old | {'baselines': {}}
  assert report_lib.read(workdir) == report
