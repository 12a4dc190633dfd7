"""Draws training throughput by length, beside the paper's."""

from collections.abc import Mapping, Sequence
import io
import os
from typing import Any

from matplotlib import axes
from matplotlib import figure

from experiments import atomic_file
from experiments import training_throughput

Row = Mapping[str, Any]

_REFERENCE_COLOUR = '0.6'


def _points(rows: Sequence[Row], field: str) -> list[tuple[str, float]]:
  return [
    (training_throughput.place(row), row[field])
    for row in rows
    if row[field] is not None
  ]


def _plot(panel: axes.Axes, rows, field: str, unit: float, **style) -> None:
  points = _points(rows, field)
  panel.plot(
    [place for place, _ in points], [x / unit for _, x in points], **style
  )


def _draw_model(panel: axes.Axes, rows: Sequence[Row], name: str) -> None:
  chosen = [row for row in rows if row['model'] == name]
  # All places first, so that a length that was not run keeps its own.
  places = [training_throughput.place(row) for row in chosen]
  panel.plot(places, [float('nan')] * len(places))
  _plot(
    panel,
    chosen,
    'paper_tokens_per_s',
    1e3,
    color=_REFERENCE_COLOUR,
    marker='s',
    markersize=4,
    label='the paper, on one H100',
  )
  _plot(
    panel,
    chosen,
    'tokens_per_s',
    1e3,
    color='tab:blue',
    marker='o',
    # Meshes are no points of a line.
    linestyle='' if any(row.get('mesh') for row in chosen) else '-',
    label='here',
  )
  for place, (row, share) in zip(
    places, [(row, row['mfu']) for row in chosen], strict=True
  ):
    if share is not None:
      panel.annotate(
        f'{share:.0%}',
        (place, row['tokens_per_s'] / 1e3),
        xytext=(0, 6),
        textcoords='offset points',
        ha='center',
        fontsize='small',
      )
  panel.set_title(name.replace('_', ' '), fontsize='medium')
  panel.set_xticks(places, places, rotation=30, ha='right')
  panel.margins(x=0.15, y=0.12)  # Room for the labels.
  panel.grid(alpha=0.25)
  panel.spines[['top', 'right']].set_visible(False)


def draw_throughput(rows: Sequence[Row], path: str | os.PathLike) -> None:
  """Draws a panel per model: tokens per second by length, and MFU.

  Args:
    rows: of one run of `benchmark_training --suite=throughput`.
    path: where the PNG goes; an old one is replaced.

  Raises:
    ValueError: there is no row, or they are of several devices.
  """
  devices = sorted({row['device'] for row in rows})
  if len(devices) != 1:
    raise ValueError(f'the rows must be of one device, got {devices}')
  names = list(dict.fromkeys(row['model'] for row in rows))
  widths = [
    max(2.8, 0.7 * sum(row['model'] == name for row in rows)) for name in names
  ]
  drawing = figure.Figure(
    figsize=(1.5 + sum(widths), 4.2), layout='constrained'
  )
  panels = drawing.subplots(
    1, len(names), sharey=True, squeeze=False, width_ratios=widths
  )[0]
  for panel, name in zip(panels, names, strict=True):
    _draw_model(panel, rows, name)
  panels[0].set_ylim(bottom=0)
  panels[0].set_ylabel('thousands of trained tokens per second')
  panels[0].legend(frameon=False, fontsize='small')
  drawing.supxlabel('tokens of a row x rows of a step', fontsize='medium')
  drawing.suptitle(
    f'Models of size {rows[0]["size"]}, {rows[0]["dtype"]}, on {devices[0]}\n'
    'per cent: share of the peak (MFU)'
  )
  buffer = io.BytesIO()
  drawing.savefig(buffer, format='png', dpi=150)
  atomic_file.replace(path, buffer.getvalue())
