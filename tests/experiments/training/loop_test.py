import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import windows
from experiments.evaluation import held_out
from experiments.training import checkpoints as checkpoints_lib
from experiments.training import goodput as goodput_lib
from experiments.training import loop
from experiments.training import metrics as metrics_lib
from experiments.training import train_step
from experiments.training import workdir as workdir_lib
from tests.experiments import tiny_run

pytestmark = pytest.mark.usefixtures('standard_promotion', 'cached_compilation')


@pytest.fixture
def run_copy(finished_run, tmp_path) -> pathlib.Path:
  return shutil.copytree(finished_run.root, tmp_path / 'run')


class Recorder:
  """Stands for the metrics and the progress of a run; keeps what they get."""

  def __init__(self):
    self.rows = []
    self.shown = []

  def write(self, kind, step, values):
    self.rows.append((kind, step, values['loss'], values['seconds']))

  def update(self, step, *, loss, tokens_per_second):
    self.shown.append((step, loss, tokens_per_second))


def step_values(loss):
  return {
    'loss': jnp.float32(loss),
    'tokens': jnp.float32(100),
    'refused_in_a_row': jnp.int32(0),
  }


def test_a_row_is_written_one_step_late(tiny_config):
  recorder = Recorder()
  goodput = goodput_lib.Goodput(0.0)
  log = loop._StepLog(tiny_config, recorder, recorder, goodput)
  written = []
  for step in (1, 2, 3):
    log.push(step, step_values(step))
    written.append([row[:3] for row in recorder.rows])
  rows = [('train', step, step) for step in (1, 2, 3)]
  assert written == [[], rows[:1], rows[:2]]
  for _ in range(2):  # A second flush has nothing to write.
    log.flush()
    assert [row[:3] for row in recorder.rows] == rows


def test_the_speed_shown_is_that_since_the_last_line(tiny_config, monkeypatch):
  # Read at the start, at each row, and by restart_clock before the last row.
  times = iter((0.0, 4.0, 5.0, 7.0, 9.0, 109.0, 110.0))
  monkeypatch.setattr(loop.time, 'monotonic', lambda: next(times))
  config = tiny_run.replace(tiny_config, 'training', log_every_steps=2)
  recorder = Recorder()
  goodput = goodput_lib.Goodput(0.0)
  log = loop._StepLog(config, recorder, recorder, goodput)
  for step in (1, 2, 3, 4):
    log.push(step, step_values(step))
  log.flush()
  log.restart_clock()
  log.push(5, step_values(5))
  log.flush()
  assert [row[3] for row in recorder.rows] == [4.0, 1.0, 2.0, 2.0, 1.0]
  assert recorder.shown == [(1, 1.0, 25.0), (2, 2.0, 100.0), (4, 4.0, 50.0)]


def kill_at_step(step):
  def kill(log, pushed, values):
    del log, values
    if pushed == step:
      raise tiny_run.Killed

  return kill


def test_what_is_on_the_disk_when_a_step_is_saved(
  tiny_config, tmp_path, monkeypatch
):
  events = []

  def note_sync(writer):
    del writer
    events.append(('sync', tiny_run.rows_of(tmp_path)[-1]['step']))

  def note_save(checkpoints, step, state, meta):
    del checkpoints
    events.append(('save', step))
    assert jax.device_get(state['step']) == meta['data_position'] == step

  tiny_run.before(monkeypatch, metrics_lib.MetricsWriter, 'sync', note_sync)
  tiny_run.before(monkeypatch, checkpoints_lib.Checkpoints, 'save', note_save)
  tiny_run.before(monkeypatch, loop._StepLog, 'push', kill_at_step(21))
  with pytest.raises(tiny_run.Killed):
    loop.train(tiny_config, tmp_path)
  assert events == [('sync', 10), ('save', 10), ('sync', 20), ('save', 20)]


def test_an_evaluation_takes_no_time_of_training(
  tiny_config, tmp_path, monkeypatch
):
  now = [0.0]

  def tick(log, step, values):
    del log, step, values
    now[0] += 1

  def evaluate_slowly(*unused_args, **unused_options):
    now[0] += 1000

  monkeypatch.setattr(loop.time, 'monotonic', lambda: now[0])
  tiny_run.before(monkeypatch, held_out, 'evaluate', evaluate_slowly)
  tiny_run.before(monkeypatch, loop._StepLog, 'push', kill_at_step(23))
  tiny_run.before(monkeypatch, loop._StepLog, 'push', tick)
  with pytest.raises(tiny_run.Killed):
    loop.train(tiny_config, tmp_path)
  rows = metrics_lib.read_rows(tmp_path / 'metrics.jsonl')
  assert now[0] > 1000
  assert max(row['seconds'] for row in rows if row['kind'] == 'train') <= 2


def test_an_unasked_transfer_in_the_loop_is_an_error(
  tiny_config, tmp_path, monkeypatch
):
  def transfer(log, step, values):
    del log, step
    values['loss'] + np.float32(1)

  tiny_run.before(monkeypatch, loop._StepLog, 'push', transfer)
  with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
    loop.train(tiny_config, tmp_path)


def test_a_finished_run_is_left_as_it_is(finished_run, run_copy):
  old = tiny_run.contents(run_copy)
  said = loop.train(finished_run.config, run_copy)
  assert said.startswith('already done\n')
  assert 'held-out bits/byte' in said
  assert tiny_run.contents(run_copy) == old


def test_a_lost_report_is_written_again_and_nothing_else(
  finished_run, run_copy
):
  old = tiny_run.contents(run_copy)
  report = run_copy / 'report.json'
  report.unlink()
  loop.train(finished_run.config, run_copy)
  new = tiny_run.contents(run_copy)
  assert json.loads(new[report]) == json.loads(old[report])
  for name in ('metrics.jsonl', 'samples.txt', 'config.json'):
    assert new[run_copy / name] == old[run_copy / name]
  tiny_run.assert_same_rows(run_copy, finished_run)


def test_a_report_that_is_not_json_is_an_error(finished_run, run_copy):
  (run_copy / 'report.json').write_text('{')
  with pytest.raises(ValueError, match='delete it'):
    loop.train(finished_run.config, run_copy)


def test_another_config_is_refused_with_the_difference(finished_run, run_copy):
  old = tiny_run.contents(run_copy)
  other = tiny_run.replace(finished_run.config, 'training', seed=9)
  with pytest.raises(
    workdir_lib.WorkdirMismatchError, match=r'config\.training\.seed: 0 != 9'
  ):
    loop.train(other, run_copy)
  assert tiny_run.contents(run_copy) == old


def test_another_corpus_is_refused_with_the_difference(
  finished_run, run_copy, tmp_path
):
  old = tiny_run.contents(run_copy)
  files = tiny_run.write_corpus(tmp_path / 'corpus')
  (tmp_path / 'corpus' / '3.txt').write_text('something else')
  other = tiny_run.replace(finished_run.config, 'data', files=(files,))
  with pytest.raises(ValueError, match='sources_fingerprint: '):
    loop.train(other, run_copy)
  assert tiny_run.contents(run_copy) == old


def test_another_tokenizer_is_refused(finished_run, run_copy, monkeypatch):
  identity = json.loads((run_copy / 'config.json').read_text())
  identity['tokenizer'] = 'another'
  (run_copy / 'config.json').write_text(json.dumps(identity))
  with pytest.raises(
    workdir_lib.WorkdirMismatchError, match='tokenizer: "another" != '
  ):
    loop.train(finished_run.config, run_copy)


@pytest.mark.parametrize(
  ('section', 'changes', 'message'),
  [
    ('model', {'vocab_size': 256}, 'model.vocab_size must be at least 257'),
    ('model', {'mixers': ('unheard_of',)}, 'unheard_of'),
    ('data', {'held_out_modulus': 10**9}, "the split 'validation'"),
    ('optimizer', {'warmup_steps': 60}, 'optimizer.warmup_steps must be below'),
  ],
)
def test_what_cannot_run_leaves_the_directory_to_a_run_that_can(
  tiny_config, tmp_path, section, changes, message
):
  config = tiny_run.replace(tiny_config, section, **changes)
  with pytest.raises(ValueError, match=message):
    loop.train(config, tmp_path)
  assert not (tmp_path / 'config.json').exists()


def test_refused_steps_are_counted_and_too_many_stop_the_run(
  tiny_config, tmp_path
):
  config = tiny_run.replace(
    tiny_config,
    'optimizer',
    peak_learning_rate=1e38,
    initial_learning_rate=1e38,
  )
  config = tiny_run.replace(config, 'training', max_bad_steps=4)
  with pytest.raises(loop.TrainingStoppedError, match='4 steps in a row'):
    loop.train(config, tmp_path)
  counts = [
    (row['step'], row['refused_in_a_row'], row['refused'])
    for row in tiny_run.rows_of(tmp_path)
  ]
  assert counts == [(1, 0, 0), (2, 1, 1), (3, 2, 2), (4, 3, 3), (5, 4, 4)]
  assert not (tmp_path / 'checkpoints').exists()


def test_spikes_are_not_applied_and_the_run_goes_on(
  tiny_config, tmp_path, monkeypatch
):
  config = tiny_run.replace(tiny_config, 'training', spike_sigmas=50.0)
  factors = {30: np.nan, 31: np.inf, 40: 1e4}
  iterator, states_of = windows.training_iterator, train_step._hidden_states

  def batches(split, data_config, *, start_step, shard_index, shard_count):
    assert (shard_index, shard_count) == (0, 1)
    whole = iterator(split, data_config, start_step=start_step)
    for step, batch in enumerate(whole, start_step):
      factor = np.full((len(batch['tokens']), 1, 1), factors.get(step, 1))
      yield batch | {'factor': factor.astype(np.float32)}

  def hidden_states(config, params, batch):
    hidden, kernel = states_of(config, params, batch)
    return hidden * batch.get('factor', 1), kernel

  monkeypatch.setattr(windows, 'training_iterator', batches)
  monkeypatch.setattr(train_step, '_hidden_states', hidden_states)
  loop.train(config, tmp_path)
  train = [row for row in tiny_run.rows_of(tmp_path) if row['kind'] == 'train']
  refused = {
    row['step']: row['refused_in_a_row']
    for row in train
    if row['refused_in_a_row']
  }
  assert refused == {31: 1, 32: 2, 41: 1}
  assert train[-1]['refused'] == 3
  report = json.loads((tmp_path / 'report.json').read_text())
  assert report['refused_steps'] == 3
  assert (
    'step 41 not applied (1 in a row)' in (tmp_path / 'log.txt').read_text()
  )
