"""Finished language models beyond the length that they were trained on."""

from collections.abc import Iterator, Sequence
import math
import os
from typing import Any

import deltanet_jax
from experiments import result_rows
from experiments.data import tokenizers
from experiments.evaluation import by_position
from experiments.training import stored_run

KIND = 'length'
SPLIT = 'validation'  # The test split is a run's report's alone.

Row = dict[str, Any]


def _load(workdirs: Sequence[str]) -> list[stored_run.StoredRun]:
  """Returns the runs; they can be compared.

  Raises:
    ValueError: fewer than one, two of one name, one that is not finished, or
      several corpora, tokenizers or training lengths.
  """
  runs = [stored_run.load(workdir) for workdir in workdirs]
  names = [run.workdir.root.name for run in runs]
  if not runs or len(set(names)) < len(names):
    raise ValueError(
      'the directories of the runs must be given, each with a last part of '
      f'its own, which names it in the figure; got {list(workdirs)}'
    )
  for run in runs:
    if not run.is_finished:
      raise ValueError(
        f'{run.workdir.root} is at step {run.step} of '
        f'{run.config.training.num_steps}: finish it with the command that '
        'began it'
      )
  wanted = {(run.corpus, run.config.data.sequence_length) for run in runs}
  if len(wanted) > 1:
    raise ValueError(
      'the runs must have one corpus and one data.sequence_length, got '
      f'(corpus, length) {sorted(wanted)}'
    )
  return runs


def _batch_size(run: stored_run.StoredRun, length: int) -> int:
  """Returns the rows that have as many tokens as the run's evaluations."""
  evaluation = run.config.evaluation
  return max(1, evaluation.batch_size * evaluation.context_length // length)


def _about(run: stored_run.StoredRun) -> Row:
  """Returns what a row says about its model."""
  config = run.config
  return {
    'kind': KIND,
    'run': run.workdir.root.name,
    'mixers': list(config.model.mixers),
    'parameters': deltanet_jax.count_parameters(config.model),
    'training_length': config.data.sequence_length,
    'steps': run.step,
    'batch_size': config.data.batch_size,
    'split': SPLIT,
    'corpus': run.corpus,
  }


def rows(
  workdirs: Sequence[str | os.PathLike[str]],
  *,
  times: int,
  max_scored: int,
) -> Iterator[list[Row]]:
  """Yields the rows of a run, a row per bucket of positions, run after run.

  `loss` and so on are those of `by_position.summarize`. `bits_per_byte` is None
  unless tokens are bytes: how many bytes those of a bucket spell is not known.

  Args:
    workdirs: directories of finished runs of `train_lm`.
    times: positions go up to this many times the training length.
    max_scored: most tokens scored of a document, in training lengths.

  Raises:
    ValueError: a run is not there or not finished, the runs cannot be compared,
      or no document is long enough.
    checkpoints.CheckpointsDamagedError: no checkpoint of a run is whole.
  """
  for run in _load(workdirs):
    reach = by_position.Reach(
      training_length=run.config.data.sequence_length,
      times=times,
      max_scored=max_scored,
    )
    found = by_position.evaluate(
      run.config.model,
      run.params,
      run.open_store().split(SPLIT),
      reach,
      batch_size=_batch_size(run, reach.length),
    )
    is_bytes = isinstance(run.tokenizer, tokenizers.ByteTokenizer)
    yield [
      _about(run)
      | row
      | {'bits_per_byte': row['loss'] / math.log(2) if is_bytes else None}
      | result_rows.origin()
      for row in found
    ]


def format_row(row: Row) -> str:
  """Returns a row as a line to read."""
  error = row['change_standard_error']
  return (
    f'{row["run"]:24} {row["first"]:>6} to {row["last"]:<6} '
    f'{row["tokens"]:>9,} tokens  loss {row["loss"]:.4f}  '
    f'{row["change"]:+.4f}' + ('' if error is None else f' +- {error:.4f}')
  )
