import json
import shutil

import jax
import pytest

from experiments import plotting
from experiments import text_generation
from experiments.data import token_store
from experiments.data import tokenizers
from experiments.evaluation import held_out
from experiments.evaluation import text_baselines
from experiments.training import loop
from experiments.training import mesh as mesh_lib
from experiments.training import placement as placement_lib
from experiments.training import report as report_lib
from experiments.training import workdir as workdir_lib
from tests.experiments import tiny_run

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

  def measure(*unused_args):
    raise ValueError('the tokenizer is not exact')

  config = finished_run.config
  mesh = mesh_lib.build(config)  # As the run was: sums round alike.
  params = jax.device_put(
    text_generation.load(finished_run.root).params,
    jax.NamedSharding(mesh, jax.P()),
  )
  placement = placement_lib.Placement(mesh_lib.batch_sharding(mesh))
  store = token_store.TokenStore.open(finished_run.root / 'tokens')
  assert old['baselines'] == text_baselines.measure(
    store.split('train'), store.split('test'), tokenizers.ByteTokenizer()
  )
  monkeypatch.setattr(text_baselines, 'measure', measure)
  workdir = workdir_lib.Workdir(tmp_path)
  metrics = finished_run.root / 'metrics.jsonl'
  workdir.metrics.write_bytes(metrics.read_bytes())
  identity = {part: old[part] for part in workdir_lib.WARNED_PARTS}
  report = report_lib.write(
    config, params, store, workdir, identity, placement=placement
  )
  assert old['commit'] and old['device'] and old['versions']['jax']
  assert report == old | {'baselines': {}}
  assert report_lib.read(workdir) == report
  test = held_out.evaluate(
    config.model,
    params,
    store.split('test'),
    config.evaluation,
    placement=placement,
  )
  assert report['held_out_bits_per_byte'] == test['bits_per_byte']


def test_the_figure_names_what_the_model_is_held_against(
  finished_run, tmp_path, monkeypatch
):
  drawn = {}

  def note(unused_rows, unused_path, *, held_out, references):
    drawn.update(held_out=held_out, references=references)

  tiny_run.before(monkeypatch, plotting, 'draw_loss', note)
  root = shutil.copytree(finished_run.root, tmp_path / 'run')
  (root / 'report.json').unlink()
  loop.train(finished_run.config, root)
  report = report_lib.read(workdir_lib.Workdir(root))
  baselines = report['baselines']
  assert drawn == {
    'held_out': report['held_out_bits_per_byte'],
    'references': {
      'order-2 n-gram': baselines['order_2'],
      'zlib': baselines['zlib'],
      'xz': baselines['xz'],
    },
  }
