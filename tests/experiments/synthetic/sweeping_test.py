"""Tests of sweeps: runs together equal runs alone; done ones are skipped."""

import io

import pytest

from experiments.synthetic import config as config_lib
from experiments.synthetic import sweeping
from experiments.synthetic import training
from tests.experiments.synthetic import tiny_mqar

pytestmark = pytest.mark.usefixtures('standard_promotion')


def test_runs_together_equal_runs_alone_and_sweeps_skip_what_is_done(tmp_path):
  runs = [tiny_mqar.RUN, tiny_mqar.with_training(learning_rate=1e-3, seed=1)]
  output, shown = tmp_path / 'rows.jsonl', io.StringIO()
  alone = sweeping.run_all(runs[:1], output, stream=shown)
  together = training.train(runs)
  rows = sweeping.run_all(runs, output, most=2, stream=shown)
  assert '2 runs, 1 of them done' in shown.getvalue()
  assert [row['key'] for row in rows] == [config_lib.key(run) for run in runs]
  assert rows[0] == alone[0]
  for history, row in zip(together, rows, strict=True):
    assert history.training_loss[-1] == pytest.approx(
      row['training_loss'], rel=1e-3
    )
  before = output.read_bytes()
  assert sweeping.run_all(runs, output, most=2, stream=shown) == rows
  assert output.read_bytes() == before
  assert {'commit', 'device', 'versions', 'config', 'seconds'} <= set(rows[0])


def test_a_small_model_learns_to_recall():
  run = tiny_mqar.with_training(num_epochs=20, stop_accuracy=0.99)
  (history,) = training.train([run])
  assert history.accuracy[-1] >= 0.99


def test_a_run_is_in_a_sweep_once():
  with pytest.raises(ValueError, match='every run once'):
    sweeping.groups([tiny_mqar.RUN] * 2, most=2)


def test_a_line_that_is_no_row_is_named(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('{"key": "a"}\n{"kind"')
  with pytest.raises(ValueError, match='line 2'):
    sweeping.run_all([tiny_mqar.RUN], path, stream=io.StringIO())


def test_groups_differ_in_rate_decay_and_seed_alone():
  runs = [tiny_mqar.with_training(seed=i) for i in range(3)]
  runs.append(tiny_mqar.with_training(batch_size=16))
  assert [len(x) for x in sweeping.groups(runs, most=2)] == [2, 1, 1]
  with pytest.raises(ValueError, match='differ otherwise'):
    training.check_group(runs)


def test_the_selected_epoch():
  history = training.History(loss=[2, 1, 3], accuracy=[0.1, 0.2, 0.2])
  assert sweeping.selected_epoch(history, 'best') == 1
  assert sweeping.selected_epoch(history, 'lowest_loss') == 1
  assert sweeping.selected_epoch(history, 'last') == 2
