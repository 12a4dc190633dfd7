"""Draws how the work of a step falls with the devices that share it."""

from collections.abc import Mapping, Sequence
import io
import os
from typing import Any

from matplotlib import axes
from matplotlib import figure
from matplotlib import ticker

from experiments import atomic_file

Row = Mapping[str, Any]

_COLOURS = {'fsdp': 'tab:blue', 'sequence': 'tab:orange'}
_STYLES = {'xla': 'o--', 'mosaic_gpu': 'o-'}
_TOLERANCE = 0.05
# Of kernels FLOPs are not known.
_PANELS = (
  ('flops', ('xla',), 'FLOPs of a device x devices, by those of one'),
  ('memory_traffic_bytes', tuple(_STYLES), 'memory traffic, likewise'),
)


def ratios(
  rows: Sequence[Row], implementation: str, axis: str, field: str
) -> dict[int, float]:
  """Returns {n: n times a device's share by the whole of one device}.

  Raises:
    ValueError: no row is of one device.
  """
  shares = {
    row['num_devices']: row[field]
    for row in rows
    if (row['implementation'], row['axis']) == (implementation, axis)
  }
  if 1 not in shares:
    raise ValueError(
      'the rows must have one of a single device for each implementation and '
      f'axis, got none for {implementation}, {axis}'
    )
  return {n: n * share / shares[1] for n, share in sorted(shares.items())}


def _draw_ratios(
  panel: axes.Axes,
  rows: Sequence[Row],
  field: str,
  implementations: Sequence[str],
) -> None:
  panel.axhspan(1 - _TOLERANCE, 1 + _TOLERANCE, color='0.9')
  for implementation in implementations:
    for axis, colour in _COLOURS.items():
      found = ratios(rows, implementation, axis, field)
      panel.plot(
        list(found),
        list(found.values()),
        _STYLES[implementation],
        color=colour,
        label=f'{axis}, {implementation}',
      )
  panel.set_ylim(0.8, None)


def _draw_sent(panel: axes.Axes, rows: Sequence[Row]) -> None:
  for axis, colour in _COLOURS.items():
    chosen = sorted(
      (
        row
        for row in rows
        if row['axis'] == axis
        and row['num_devices'] > 1
        and 'formula_bytes' in row
      ),
      key=lambda row: row['num_devices'],
    )
    counts = [row['num_devices'] for row in chosen]
    for field, style in (('formula_bytes', '-'), ('sent_bytes', 'o')):
      panel.plot(
        counts, [row[field] / 1e9 for row in chosen], style, color=colour
      )
  panel.plot([], [], 'o', color='0.4', label='compiled')
  panel.plot([], [], '-', color='0.4', label='formula')
  panel.set_title('GB that a device sends in a step, xla', fontsize='medium')
  panel.set_ylim(0, None)


def draw_scaling(rows: Sequence[Row], path: str | os.PathLike) -> None:
  """Draws FLOPs, memory traffic and what is sent, by number of devices.

  Args:
    rows: of `compile_report --suite=scaling`.
    path: where the PNG goes; an old one is replaced.

  Raises:
    ValueError: no row of an implementation and axis is of one device.
  """
  drawing = figure.Figure(figsize=(11, 3.6), layout='constrained')
  panels = drawing.subplots(1, 3)
  for panel, (field, shown, title) in zip(panels, _PANELS, strict=False):
    _draw_ratios(panel, rows, field, shown)
    panel.set_title(title, fontsize='medium')
  _draw_sent(panels[2], rows)
  for panel in panels:
    panel.set_xscale('log', base=2)
    panel.xaxis.set_major_formatter(ticker.StrMethodFormatter('{x:.0f}'))
    panel.set_xlabel('devices')
    panel.grid(alpha=0.25)
    panel.spines[['top', 'right']].set_visible(False)
    panel.legend(frameon=False, fontsize='small')
  data = io.BytesIO()
  drawing.savefig(data, format='png', dpi=150)
  atomic_file.replace(path, data.getvalue())
