"""Accuracies of the published protocols, from predictions on a test set.

token     right targets / all targets (micro average)
example   mean over examples of the right part of their targets (Zoology)
macro     recall per class, averaged over the classes that occur as target
or prediction; per batch of 128, then over batches (MAD)
sequence  part of examples that have every target right
dfa       part of scored positions whose prediction is allowed (RegBench)
"""

from collections.abc import Iterable

import numpy as np

from experiments.synthetic import task as task_lib

MACRO_BATCH = 128


def _macro(predicted: np.ndarray, targets: np.ndarray) -> float:
  """Returns the macro average of one batch."""
  scored = targets != task_lib.IGNORED
  predicted, targets = predicted[scored], targets[scored]
  size = 1 + max(predicted.max(initial=0), targets.max(initial=0))
  right = np.bincount(targets[predicted == targets], minlength=size)
  total = np.bincount(targets, minlength=size)
  occurs = (total + np.bincount(predicted, minlength=size)) > 0
  return float(np.mean(right[occurs] / np.maximum(total[occurs], 1)))


def _batches(*arrays: np.ndarray) -> Iterable[tuple[np.ndarray, ...]]:
  for start in range(0, len(arrays[0]), MACRO_BATCH):
    yield tuple(x[start : start + MACRO_BATCH] for x in arrays)


def accuracies(
  predicted: np.ndarray, examples: task_lib.Examples
) -> dict[str, float]:
  """Returns every accuracy of the module by its name.

  `dfa` is there where the examples have `allowed`.

  Args:
    predicted: int [N, T], the most likely token at every position; at positions
      without target it is not read.
    examples: that were predicted.

  Raises:
    ValueError: shapes differ, or an example has no target.
  """
  targets = examples.targets
  if predicted.shape != targets.shape:
    raise ValueError(
      'predicted must have the shape of the targets, '
      f'{targets.shape}, got {predicted.shape}'
    )
  scored = targets != task_lib.IGNORED
  counts = scored.sum(axis=1)
  if not counts.all():
    raise ValueError(
      'every example must have a target, got none in example '
      f'{int(np.argmin(counts))}'
    )
  right = (predicted == targets) & scored
  result = {
    'token': float(right.sum() / counts.sum()),
    'example': float(np.mean(right.sum(axis=1) / counts)),
    'macro': float(
      np.mean([_macro(*batch) for batch in _batches(predicted, targets)])
    ),
    'sequence': float(np.mean(right.sum(axis=1) == counts)),
  }
  if examples.allowed is not None:
    allowed = np.take_along_axis(
      examples.allowed, np.where(scored, predicted, 0)[..., None], axis=2
    )[..., 0]
    result['dfa'] = float(allowed[scored].mean())
  return result


def by_position(
  predicted: np.ndarray, examples: task_lib.Examples, *, num_bins: int = 16
) -> list[dict[str, float]]:
  """Returns the accuracy of the targets, position by position, in bins.

  A target counts as right where all targets up to it are: for a task with one
  target at the end this is the accuracy by length, for one with a target
  everywhere that of prefixes.

  Returns:
    A dict per bin that has targets: `first` and `last` position, `count`,
    `accuracy`.
  """
  targets = examples.targets
  scored = targets != task_lib.IGNORED
  wrong = (predicted != targets) & scored
  right = scored & (np.cumsum(wrong, axis=1) == 0)
  edges = np.linspace(0, targets.shape[1], num_bins + 1).astype(int)
  bins = []
  for first, end in zip(edges[:-1], edges[1:], strict=True):
    count = int(scored[:, first:end].sum())
    if count:
      accuracy = float(right[:, first:end].sum() / count)
      bins.append(
        {
          'first': int(first),
          'last': int(end - 1),
          'count': count,
          'accuracy': accuracy,
        }
      )
  return bins
