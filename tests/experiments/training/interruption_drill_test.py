"""Ends training runs by signals and by kills at chosen moments."""

import os
import signal

import pytest

from experiments.data import tokenizers
from experiments.evaluation import held_out
from experiments.training import checkpoints as checkpoints_lib
from experiments.training import loop
from experiments.training import progress as progress_lib
from experiments.training import workdir as workdir_lib
from tests.experiments import tiny_run

pytestmark = pytest.mark.usefixtures('standard_promotion', 'cached_compilation')


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

  def check_saved(progress, text):
    del progress
    if 'is saved' in text:
      assert tiny_run.saved_steps(tmp_path) == [10, 20, 23]

  with monkeypatch.context() as patch:
    tiny_run.before(patch, loop._StepLog, 'push', interrupt)
    tiny_run.before(patch, progress_lib.Progress, 'note', check_saved)
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


def test_a_signal_while_the_corpus_is_tokenised(
  finished_run, tmp_path, monkeypatch
):
  encoded = []

  def interrupt(tokenizer, text):
    del tokenizer
    encoded.append(text)
    if len(encoded) == 5:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    tiny_run.before(patch, tokenizers.ByteTokenizer, 'encode', interrupt)
    said = loop.train(finished_run.config, tmp_path)
  assert said.startswith('interrupted\nSIGTERM: stopped after 5 documents')
  assert 'the same command' in said
  assert len(encoded) == 5
  assert [path.name for path in tmp_path.iterdir()] == ['.lock']
  loop.train(finished_run.config, tmp_path)
  tiny_run.assert_same_rows(tmp_path, finished_run)


@pytest.mark.parametrize('step', [20, 40, 60])
@pytest.mark.parametrize('moment', ['before', 'after'])
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
    if moment == 'before':
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

  def note(model, params, split, evaluation, *, placement, num_tokens=None):
    del model, params, evaluation, placement
    evaluated.append((split.name, num_tokens))

  def kill(checkpoints, step, state, meta):
    del checkpoints, state, meta
    if step == 35:
      raise tiny_run.Killed

  tiny_run.before(monkeypatch, held_out, 'evaluate', note)
  with monkeypatch.context() as patch:
    tiny_run.before(patch, checkpoints_lib.Checkpoints, 'save', kill)
    with pytest.raises(tiny_run.Killed):
      loop.train(config, tmp_path)
  rows = tiny_run.rows_of(tmp_path)
  assert [row['step'] for row in rows] == [*range(1, 21), 20, *range(21, 36)]
  assert [row['kind'] for row in rows[19:21]] == ['train', 'eval']
  loop.train(config, tmp_path)
  assert tiny_run.saved_steps(tmp_path) == [35, 60]
  # Step 20 twice, as the rows of the killed run had no checkpoint.
  assert evaluated == [
    *[('validation', 200)] * 3,
    ('validation', None),
    ('test', None),
  ]
  steps = [
    row['step'] for row in tiny_run.rows_of(tmp_path) if row['kind'] == 'eval'
  ]
  assert steps == list(tiny_run.EVALUATION_STEPS)


def test_killed_before_the_report_it_is_written(
  finished_run, tmp_path, monkeypatch
):
  def kill(*unused_args, **unused_options):
    raise tiny_run.Killed

  with monkeypatch.context() as patch:
    tiny_run.before(patch, loop.report_lib, 'write', kill)
    with pytest.raises(tiny_run.Killed):
      loop.train(finished_run.config, tmp_path)
  assert not (tmp_path / 'report.json').exists()
  loop.train(finished_run.config, tmp_path)
  tiny_run.assert_same_rows(tmp_path, finished_run)
  assert (tmp_path / 'report.json').exists()
