"""Draws the sizes and speeds of the token mixers."""

from collections.abc import Mapping, Sequence
import io
import os
from typing import Any

from matplotlib import figure

from experiments import atomic_file

PANELS = {
  'trained_tokens_per_s': 'tokens trained per second',
  'decoded_tokens_per_s': 'tokens decoded per second, batch 1',
  'state_bytes': 'state: bytes per layer and row',
}


def draw_mixers(
  rows: Sequence[Mapping[str, Any]], path: str | os.PathLike
) -> None:
  """Draws a panel of bars per measured quantity, a bar per mixer.

  Args:
    rows: of one run of `benchmark_training`.
    path: where the PNG goes; an old one is replaced.

  Raises:
    ValueError: there is no row, or they are of several devices.
  """
  devices = sorted({row['device'] for row in rows})
  if len(devices) != 1:
    raise ValueError(f'the rows must be of one device, got {devices}')
  rows = sorted(rows, key=lambda row: row['trained_tokens_per_s'])
  drawing = figure.Figure(
    figsize=(11, 1.2 + 0.25 * len(rows)), layout='constrained'
  )
  panels = drawing.subplots(1, len(PANELS), sharey=True)
  for panel, (field, title) in zip(panels, PANELS.items(), strict=True):
    panel.barh([row['mixer'] for row in rows], [row[field] for row in rows])
    panel.set_title(title, fontsize='medium')
    panel.grid(alpha=0.25, axis='x')
    panel.spines[['top', 'right']].set_visible(False)
  panels[-1].set_xscale('log')
  sizes = rows[0]['sizes']
  drawing.suptitle(
    f'{sizes["num_layers"]} layers of width {sizes["model_width"]}, '
    f'{sizes["batch"]} x {sizes["length"]} tokens a step, {sizes["dtype"]}, '
    f'on {devices[0]}'
  )
  buffer = io.BytesIO()
  drawing.savefig(buffer, format='png', dpi=150)
  atomic_file.replace(path, buffer.getvalue())
