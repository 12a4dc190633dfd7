"""Draws the loss of language models by position, beyond the training length."""

from collections.abc import Mapping, Sequence
import io
import os
from typing import Any

from matplotlib import axes
from matplotlib import figure
from matplotlib import ticker
import numpy as np

from experiments import atomic_file

Row = Mapping[str, Any]

_REFERENCE_COLOUR = '0.45'
# Changes are drawn to scale up to here and by their logarithm beyond: some
# models lose hundredths of a nat, others several.
_LINEAR_UP_TO = 0.1
_PANELS = (
  ('loss', 'standard_error', 'loss (nats/token)'),
  ('change', 'change_standard_error', 'its change from the training length'),
)


def _draw_lines(
  panel: axes.Axes, runs: Mapping[str, Sequence[Row]], value: str, error: str
) -> None:
  """Draws a line a run and, where errors are known, a band around it."""
  for name, rows in runs.items():
    middles = [(row['first'] + row['last']) / 2 for row in rows]
    heights = np.array([row[value] for row in rows])
    errors = np.array([row[error] or 0 for row in rows])
    (line,) = panel.plot(middles, heights, marker='o', markersize=4, label=name)
    panel.fill_between(
      middles,
      heights - errors,
      heights + errors,
      color=line.get_color(),
      alpha=0.2,
      linewidth=0,
    )


def _mark_lengths(panel: axes.Axes, rows: Sequence[Row]) -> None:
  """Marks the training length and its multiples that are powers of two."""
  trained, last = rows[0]['training_length'], rows[-1]['last']
  panel.axvline(trained, color=_REFERENCE_COLOUR, linewidth=1, linestyle='--')
  panel.set_xscale('log', base=2)
  ticks = [trained * 2.0**i for i in range(-2, 20)]
  panel.set_xticks([tick for tick in ticks if tick <= last])
  panel.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  panel.xaxis.set_minor_locator(ticker.NullLocator())
  panel.set_xlabel('position: tokens of the document before')


def draw_length(rows: Sequence[Row], path: str | os.PathLike) -> None:
  """Draws loss, and its change from the training length, by position.

  A line a run, over buckets of positions; bands are a standard error up and
  down. The training length is dashed.

  Args:
    rows: of one call of `evaluate_length`.
    path: where the PNG goes; an old one is replaced.

  Raises:
    ValueError: there is no row, or they cannot be compared: their training
      lengths or corpora differ.
  """
  wanted = {(row['training_length'], row['corpus']) for row in rows}
  if len(wanted) != 1:
    raise ValueError(
      'the rows must be of one training length and corpus, got '
      f'{len(rows)} rows of {sorted(wanted)}'
    )
  runs: dict[str, list[Row]] = {}
  for row in sorted(rows, key=lambda row: row['first']):
    runs.setdefault(row['run'], []).append(row)
  drawing = figure.Figure(figsize=(10, 4.2), layout='constrained')
  panels = drawing.subplots(1, len(_PANELS))
  for panel, (value, error, title) in zip(panels, _PANELS, strict=True):
    _draw_lines(panel, runs, value, error)
    _mark_lengths(panel, next(iter(runs.values())))
    panel.set_ylabel(title)
    panel.grid(alpha=0.25)
    panel.spines[['top', 'right']].set_visible(False)
  panels[0].legend(frameon=False)
  panels[1].set_yscale('symlog', linthresh=_LINEAR_UP_TO)
  panels[1].yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  first = rows[0]
  drawing.suptitle(
    f'trained on {first["training_length"]} tokens (dashed), the same tokens '
    f'of {first["documents"]} documents at every position'
  )
  buffer = io.BytesIO()
  drawing.savefig(buffer, format='png', dpi=150)
  atomic_file.replace(path, buffer.getvalue())
