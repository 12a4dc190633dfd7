import json
import pathlib
import shutil
import signal

import numpy as np
import pytest

from experiments.data import windows
from experiments.evaluation import held_out
from experiments.training import checkpoints as checkpoints_lib
from experiments.training import loop
from experiments.training import train_step
from experiments.training import workdir as workdir_lib
from tests.experiments import tiny_run

pytestmark = pytest.mark.usefixtures('standard_promotion', 'cached_compilation')


@pytest.fixture
def run_copy(finished_run, tmp_path) -> pathlib.Path:
  return shutil.copytree(finished_run.root, tmp_path / 'run')


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
    ('data', {'held_out_modulus': 10**9}, 'no text is held out'),
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


@pytest.mark.parametrize(
  ('number', 'times'), [(signal.SIGTERM, 1), (signal.SIGINT, 2)]
)
def test_a_signal_saves_and_the_same_call_resumes(
  finished_run, tmp_path, monkeypatch, number, times
):
  def interrupt(log, step, values):
    del log, values
    if step == 23:
      for _ in range(times):
        signal.raise_signal(number)

  with monkeypatch.context() as patch:
    tiny_run.before(patch, loop._StepLog, 'push', interrupt)
    assert loop.train(finished_run.config, tmp_path) == 'interrupted'
  assert tiny_run.saved_steps(tmp_path) == [10, 20, 23]
  assert (
    f'{number.name}: step 23 is saved' in (tmp_path / 'log.txt').read_text()
  )
  loop.train(finished_run.config, tmp_path)
  tiny_run.assert_same_rows(tmp_path, finished_run)


def test_a_signal_before_the_first_step(finished_run, tmp_path, monkeypatch):
  def interrupt(*unused_args):
    signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    tiny_run.before(patch, workdir_lib, 'claim', interrupt)
    assert loop.train(finished_run.config, tmp_path) == 'interrupted'
    # Asked again: nothing is lost, and no step is done.
    assert loop.train(finished_run.config, tmp_path) == 'interrupted'
  assert tiny_run.saved_steps(tmp_path) == [0]
  assert tiny_run.rows_of(tmp_path) == []
  loop.train(finished_run.config, tmp_path)
  tiny_run.assert_same_rows(tmp_path, finished_run)


@pytest.mark.parametrize('step', [20, 40, 60])
@pytest.mark.parametrize('moment', ['tiny_run.before', 'after'])
def test_killed_around_an_evaluation_it_is_written_once(
  finished_run, tmp_path, monkeypatch, step, moment
):
  def kill(config, state, evaluated, *unused_args):
    del config, state
    if evaluated == step:
      raise tiny_run.Killed

  def kill_after_eval(log):
    del log
    rows = tiny_run.rows_of(tmp_path)
    if rows and rows[-1]['kind'] == 'eval' and rows[-1]['step'] == step:
      raise tiny_run.Killed

  with monkeypatch.context() as patch:
    if moment == 'tiny_run.before':
      tiny_run.before(patch, loop, '_evaluate', kill)
    else:
      tiny_run.before(patch, loop._StepLog, 'restart_clock', kill_after_eval)
    with pytest.raises(tiny_run.Killed):
      loop.train(finished_run.config, tmp_path)
  assert tiny_run.saved_steps(tmp_path)[-1] == step
  loop.train(finished_run.config, tmp_path)
  tiny_run.assert_same_rows(tmp_path, finished_run)


def test_killed_between_evaluation_and_save_it_is_done_again(
  tiny_config, tmp_path, monkeypatch
):
  config = tiny_run.replace(tiny_config, 'checkpoint', every_steps=35)
  evaluated = []

  def note(model, params, split, evaluation, *, num_tokens):
    del model, params, split, evaluation
    evaluated.append(num_tokens)

  def kill(checkpoints, step, state, meta):
    del checkpoints, state, meta
    if step == 35:
      raise tiny_run.Killed

  tiny_run.before(monkeypatch, held_out, 'evaluate', note)
  with monkeypatch.context() as patch:
    tiny_run.before(patch, checkpoints_lib.Checkpoints, 'save', kill)
    with pytest.raises(tiny_run.Killed):
      loop.train(config, tmp_path)
  assert [row['step'] for row in tiny_run.rows_of(tmp_path)] == [
    *range(1, 21),
    20,
    *range(21, 36),
  ]
  loop.train(config, tmp_path)
  # Step 20 twice, as the rows of the killed run had no checkpoint.
  assert evaluated == [200, 200, 200, None]
  steps = [
    row['step'] for row in tiny_run.rows_of(tmp_path) if row['kind'] == 'eval'
  ]
  assert steps == list(tiny_run.EVALUATION_STEPS)


def test_killed_before_the_report_it_is_written(
  finished_run, tmp_path, monkeypatch
):
  def kill(*unused_args):
    raise tiny_run.Killed

  with monkeypatch.context() as patch:
    tiny_run.before(patch, loop.report_lib, 'write', kill)
    with pytest.raises(tiny_run.Killed):
      loop.train(finished_run.config, tmp_path)
  assert not (tmp_path / 'report.json').exists()
  loop.train(finished_run.config, tmp_path)
  tiny_run.assert_same_rows(tmp_path, finished_run)
  assert (tmp_path / 'report.json').exists()


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
  iterator, losses_of = windows.training_iterator, train_step.token_losses

  def batches(split, data_config, *, start_step):
    whole = iterator(split, data_config, start_step=start_step)
    for step, batch in enumerate(whole, start_step):
      yield batch | {'factor': np.float32(factors.get(step, 1))}

  def token_losses(config, params, batch):
    losses, counts = losses_of(config, params, batch)
    return losses * batch.get('factor', 1), counts

  monkeypatch.setattr(windows, 'training_iterator', batches)
  monkeypatch.setattr(train_step, 'token_losses', token_losses)
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
