"""Draws the results of `benchmark_kernels`."""

from collections.abc import Mapping, Sequence
import io
import json
import os
import pathlib
from typing import Any

from matplotlib import axes
from matplotlib import figure
import numpy as np

from experiments import atomic_file

Row = Mapping[str, Any]

_PANELS = (
  ('speed_up', 'speed-up over the token scan'),
  ('temp_ratio', 'times less temporary memory'),
)
_COLOURS = {'forward': 'tab:cyan', 'forward_backward': 'tab:blue'}


def read_rows(path: str | os.PathLike) -> list[Row]:
  """Returns the kernel rows of a JSONL file; other kinds are left out.

  Raises:
    ValueError: a line is no JSON object.
  """
  rows = []
  lines = pathlib.Path(path).read_text().splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise ValueError(
        f'{path}, line {number}: not JSON ({error}); repair or remove it'
      ) from error
    if not isinstance(row, dict):
      raise ValueError(
        f'{path}, line {number}: must be a JSON object, got {line[:80]!r}'
      )
    if row.get('kind') == 'kernel':
      rows.append(row)
  return rows


def _label(row: Row) -> str:
  shape = row['shape']
  return (
    f'{shape["name"]}\nB{shape["B"]} T{shape["T"]} H{shape["HV"]} K{shape["K"]}'
  )


def _draw_bars(panel: axes.Axes, rows: Sequence[Row], value: str) -> None:
  labels = list(dict.fromkeys(_label(row) for row in rows))
  passes = list(dict.fromkeys(row['pass'] for row in rows))
  width = 0.8 / len(passes)
  for i, name in enumerate(passes):
    chosen = [row for row in rows if row['pass'] == name]
    positions = [labels.index(_label(row)) for row in chosen]
    bars = panel.bar(
      np.array(positions) + (i - (len(passes) - 1) / 2) * width,
      [row[value] for row in chosen],
      width=0.94 * width,
      color=_COLOURS[name],
      label=name.replace('_', ' + '),
    )
    panel.bar_label(bars, fmt='%.1f', fontsize='small', padding=3)
  panel.axhline(1, color='0.45', linewidth=1, linestyle='--', zorder=0)
  panel.set_xticks(range(len(labels)), labels, fontsize='small')
  panel.margins(y=0.12)
  panel.spines[['top', 'right']].set_visible(False)


def draw_kernels(rows: Sequence[Row], path: str | os.PathLike) -> None:
  """Draws speed and memory of `xla` relative to `recurrent` as bars.

  Args:
    rows: of `benchmark_kernels`, from one device.
    path: where the PNG goes; an old one is replaced.

  Raises:
    ValueError: there is no row, or the rows are of several devices.
  """
  devices = sorted({row['device'] for row in rows})
  if len(devices) != 1:
    raise ValueError(
      f'the rows must be of one device, got {len(rows)} rows of {devices}'
    )
  drawing = figure.Figure(figsize=(9, 3.8), layout='constrained')
  panels = drawing.subplots(1, len(_PANELS))
  for panel, (value, title) in zip(panels, _PANELS, strict=True):
    _draw_bars(panel, rows, value)
    panel.set_title(title, fontsize='medium')
  panels[0].legend(frameon=False, fontsize='small')
  drawing.suptitle(
    f'delta_rule, xla against recurrent, one run on {devices[0]}'
  )
  buffer = io.BytesIO()
  drawing.savefig(buffer, format='png', dpi=150)
  atomic_file.replace(path, buffer.getvalue())
