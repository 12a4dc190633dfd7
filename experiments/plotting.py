"""Draws the curves of a run from its rows of metrics."""

from collections.abc import Iterable, Mapping, Sequence
import io
import math
import os
from typing import Any

from matplotlib import axes
from matplotlib import figure
import numpy as np

from experiments import atomic_file

_TRAINING_COLOUR = 'tab:blue'
_EVALUATION_COLOUR = 'tab:red'
_REFERENCE_COLOUR = '0.45'


def _points(
  rows: Iterable[Mapping[str, Any]], kind: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns steps and finite values of one curve, by step."""
  points = sorted(
    (row['step'], row[name])
    for row in rows
    if row['kind'] == kind and math.isfinite(row.get(name, math.nan))
  )
  steps, values = np.array(points, dtype=float).reshape(-1, 2).T
  return steps, values


def _moving_average(values: np.ndarray) -> np.ndarray:
  """Returns means over a centred window, shorter at both ends."""
  radius = max(1, len(values) // 50)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  low = np.maximum(index - radius, 0)
  high = np.minimum(index + radius + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def _draw_training(panel: axes.Axes, steps, loss) -> None:
  panel.plot(steps, loss, color=_TRAINING_COLOUR, alpha=0.3, linewidth=0.8)
  panel.plot(
    steps, _moving_average(loss), color=_TRAINING_COLOUR, linewidth=1.6
  )
  panel.set_ylabel('training loss (nats/token)')


def _draw_evaluation(
  panel: axes.Axes,
  steps,
  bits_per_byte,
  held_out: float | None,
  references: Mapping[str, float],
) -> None:
  panel.plot(
    steps, bits_per_byte, color=_EVALUATION_COLOUR, marker='o', markersize=3
  )
  last = bits_per_byte[-1]
  reached, lowest = f'validation {last:.3f}', last
  if held_out is not None:
    panel.plot(steps[-1], held_out, color=_EVALUATION_COLOUR, marker='*')
    reached += f', held-out {held_out:.3f} (star)'
    lowest = min(last, held_out)
  panel.annotate(
    reached,
    (steps[-1], lowest),
    xytext=(0, -14),
    textcoords='offset points',
    ha='right',
    color=_EVALUATION_COLOUR,
  )
  for label, value in references.items():
    panel.axhline(value, color=_REFERENCE_COLOUR, linewidth=1, linestyle='--')
    panel.annotate(
      f'{label} {value:.3f}',
      (1, value),
      xycoords=('axes fraction', 'data'),
      xytext=(4, 0),
      textcoords='offset points',
      va='center',
      color=_REFERENCE_COLOUR,
      fontsize='small',
    )
  panel.margins(y=0.12)
  panel.set_ylabel('bits per byte')


def _save(drawing: figure.Figure, path: str | os.PathLike) -> None:
  buffer = io.BytesIO()
  drawing.savefig(buffer, format='png', dpi=150)
  atomic_file.replace(path, buffer.getvalue())


def draw_loss(
  rows: Sequence[Mapping[str, Any]],
  path: str | os.PathLike,
  *,
  held_out: float | None = None,
  references: Mapping[str, float] | None = None,
) -> None:
  """Draws training loss and validation bits per byte against the step.

  Points that are not finite are left out.

  Args:
    rows: of `metrics.read_rows`: 'loss' of the train rows (nats per token) and
      'bits_per_byte' of the eval rows. One kind may be missing.
    path: where the PNG goes; an old one is replaced.
    held_out: bits per byte of the trained model on the held-out text.
    references: label -> bits per byte on that text of what the model is held
      against, such as general compressors.

  Raises:
    ValueError: no row has a finite value to draw.
  """
  training = _points(rows, 'train', 'loss')
  evaluation = _points(rows, 'eval', 'bits_per_byte')
  draw = []
  if training[0].size:
    draw.append(lambda panel: _draw_training(panel, *training))
  if evaluation[0].size:
    draw.append(
      lambda panel: _draw_evaluation(
        panel, *evaluation, held_out, references or {}
      )
    )
  if not draw:
    raise ValueError(
      "no row to draw: neither a train row with a finite 'loss' nor an eval "
      f"row with a finite 'bits_per_byte' among {len(rows)} rows"
    )
  drawing = figure.Figure(
    figsize=(7.5, 0.6 + 2.9 * len(draw)), layout='constrained'
  )
  panels = drawing.subplots(len(draw), sharex=True, squeeze=False)[:, 0]
  for panel, draw_panel in zip(panels, draw, strict=True):
    draw_panel(panel)
    panel.grid(alpha=0.25)
    panel.spines[['top', 'right']].set_visible(False)
  panels[-1].set_xlabel('step')
  _save(drawing, path)
