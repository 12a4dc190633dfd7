"""Runs a list of configurations, each once, and keeps a row of results each."""

from collections.abc import Callable, Iterable, Sequence
import os
import pathlib
from typing import TextIO

from experiments import result_rows
from experiments.synthetic import config as config_lib
from experiments.synthetic import group_checkpoint
from experiments.synthetic import model
from experiments.synthetic import training as training_lib
from experiments.training import progress as progress_lib

Row = result_rows.Row
KIND = 'synthetic'


def selected_epoch(
  history: training_lib.History, selection: config_lib.Selection
) -> int:
  """Returns the index of the epoch that is reported; of equals the first."""
  epochs = range(len(history.accuracy))
  if selection == 'best':
    return max(epochs, key=history.accuracy.__getitem__)
  if selection == 'lowest_loss':
    return min(epochs, key=history.loss.__getitem__)
  return epochs[-1]


def row(
  run: config_lib.RunConfig, history: training_lib.History, group_size: int
) -> Row:
  """Returns what a run reached, its configuration and where it ran.

  `accuracy` is the test accuracy, by the metric of the configuration, of the
  selected epoch; `last_accuracy` and `max_accuracy` are of the last and of the
  best epoch on the test set. `seconds` is of all `group_size` runs that were
  trained together.
  """
  training = run.training
  epoch = selected_epoch(history, training.selection)
  values = [test[training.metric] for test in history.test]
  return {
    'kind': KIND,
    'name': run.name,
    'key': config_lib.key(run),
    'mixer': '+'.join(run.model.mixers),
    'accuracy': values[epoch],
    'last_accuracy': values[-1],
    'max_accuracy': max(values),
    'test': history.test[epoch],
    'by_position': history.by_position[epoch],
    'epoch': epoch + 1,
    'epochs': len(values),
    'training_loss': history.training_loss[-1],
    'parameters': model.count_parameters(run),
    'seconds': history.seconds[-1],
    'group_size': group_size,
    'config': config_lib.as_dict(run),
    **result_rows.origin(),
  }


def groups(
  runs: Iterable[config_lib.RunConfig], *, most: int
) -> list[list[config_lib.RunConfig]]:
  """Returns the runs in groups that train together, each of at most `most`.

  Raises:
    ValueError: `most` is below 1, or a run is there twice.
  """
  if most < 1:
    raise ValueError(f'most must be at least 1, got {most}')
  by_key: dict[str, list[config_lib.RunConfig]] = {}
  seen = set()
  for run in runs:
    if config_lib.key(run) in seen:
      raise ValueError(f'a sweep must have every run once, got twice: {run}')
    seen.add(config_lib.key(run))
    by_key.setdefault(config_lib.group_key(run), []).append(run)
  return [
    group[start : start + most]
    for group in by_key.values()
    for start in range(0, len(group), most)
  ]


def _tokens_per_epoch(group: Sequence[config_lib.RunConfig]) -> int:
  run = group[0]
  examples = run.training.steps_per_epoch * run.training.batch_size
  return len(group) * examples * run.task.sequence_length


def describe(finished: Row) -> str:
  """Returns a line about a row."""
  training = finished['config']['training']
  return (
    f'{finished["name"]:18}{finished["mixer"]:34}'
    f'width {finished["config"]["model"]["model_width"]:<5}'
    f'rate {training["learning_rate"]:<9.3g}seed {training["seed"]:<4}'
    f'{training["metric"]} accuracy {finished["accuracy"]:7.2%}  '
    f'epoch {finished["epoch"]}/{finished["epochs"]}  '
    f'{progress_lib.format_duration(finished["seconds"])}'
  )


def _train_group(
  group: Sequence[config_lib.RunConfig],
  checkpoint: pathlib.Path,
  progress: progress_lib.Progress,
  done: int,
) -> list[Row]:
  """Trains a group; `done` epochs of the sweep came before it."""

  def on_epoch(epoch, histories):
    seconds = max(history.seconds[-1] for history in histories)
    losses = [history.training_loss[-1] for history in histories]
    progress.update(
      done + epoch,
      loss=sum(losses) / len(losses),
      tokens_per_second=epoch * _tokens_per_epoch(group) / seconds,
    )

  histories = training_lib.train(
    group, checkpoint=checkpoint, on_epoch=on_epoch
  )
  return [
    row(run, history, len(group))
    for run, history in zip(group, histories, strict=True)
  ]


def run_all(
  runs: Sequence[config_lib.RunConfig],
  output: str | os.PathLike,
  *,
  most: int = 1,
  stream: TextIO | None = None,
  on_row: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
  """Trains the runs that `output` does not have yet; returns all their rows.

  The file is replaced after every group. What a group has reached is kept
  beside it in an `.unfinished.npz`, so that a kill loses an epoch.

  Args:
    runs: of the sweep, each another one.
    output: JSONL, gets a row per run.
    most: runs that are trained together where they differ in learning rate,
      weight decay and seed alone.
    stream: gets the progress; None: standard error.
    on_row: called with every new row.

  Raises:
    ValueError: a run is there twice, the file has a line that is no row, or
      what is unfinished is damaged or of a group that is not next.
  """
  output = pathlib.Path(output)
  checkpoint = output.with_suffix('.unfinished.npz')
  output.parent.mkdir(parents=True, exist_ok=True)
  rows = result_rows.read(output, needs='key')
  finished = {found['key'] for found in rows}
  if finished.issuperset(group_checkpoint.run_keys(checkpoint)):
    checkpoint.unlink(missing_ok=True)  # A kill came between row and removal.
  planned = groups(runs, most=most)
  todo = [
    left
    for group in planned
    if (left := [r for r in group if config_lib.key(r) not in finished])
  ]
  total = sum(group[0].training.num_epochs for group in todo)
  log = pathlib.Path(os.devnull)
  with progress_lib.Progress(total, log, stream=stream) as progress:
    skipped = len(runs) - sum(map(len, todo))
    progress.note(f'{len(runs)} runs, {skipped} of them done')
    done = 0
    for group in todo:
      for new in _train_group(group, checkpoint, progress, done):
        rows.append(new)
        progress.note(describe(new))
        on_row(new)
      result_rows.write(output, rows)
      checkpoint.unlink(missing_ok=True)
      done += group[0].training.num_epochs
  wanted = {config_lib.key(run) for run in runs}
  return [found for found in rows if found['key'] in wanted]
