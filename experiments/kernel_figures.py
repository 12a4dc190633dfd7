"""Draws the results of `benchmark_kernels`, a figure per suite."""

from collections.abc import Callable, Mapping, Sequence
import io
import os
from typing import Any

from matplotlib import axes
from matplotlib import figure
from matplotlib import ticker
import numpy as np

from experiments import atomic_file

Row = Mapping[str, Any]

# Speed-up of the chunkwise over the recurrent kernel by head dimension, read
# off figure 1 of Yang et al., 2024, to about 0.1.
PAPER_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PAPER_SPEED_UPS = {
  64: (4.0, 4.5, 5.8, 9.5, 15.6, 23.7),
  128: (7.1, 7.45, 7.3, 10.5, 15.8, 32.8),
  256: (10.2, 10.2, 10.2, 17.5, 28.7, 36.6),
}

_PANELS = (
  ('speed_up', 'speed-up over the token scan'),
  ('temp_ratio', 'times less temporary memory'),
)
_COLOURS = {'forward': 'tab:cyan', 'forward_backward': 'tab:blue'}
_REFERENCE_COLOUR = '0.6'


def _sizes(row: Row) -> str:
  shape = row['shape']
  return (
    f'B {shape["B"]}, T {shape["T"]}, H {shape["HV"]}, K = V = {shape["K"]}, '
    f'{shape["dtype"]}'
  )


def _unique(values) -> list:
  return list(dict.fromkeys(values))


def _label(row: Row) -> str:
  return f'{row["op"].replace("_", " ")}\n{row["variant"]}'


def _draw_bars(
  panel: axes.Axes, rows: Sequence[Row], value: str, labels: list[str]
) -> None:
  """Draws groups of bars, one per label, the first on top."""
  passes = _unique(row['pass'] for row in rows)
  height = 0.8 / len(passes)
  for i, name in enumerate(passes):
    chosen = [
      row for row in rows if row['pass'] == name and row[value] is not None
    ]
    positions = [labels.index(_label(row)) for row in chosen]
    bars = panel.barh(
      np.array(positions) + (i - (len(passes) - 1) / 2) * height,
      [row[value] for row in chosen],
      height=0.92 * height,
      color=_COLOURS[name],
      label=name.replace('_', ' + '),
    )
    panel.bar_label(bars, fmt='{:.2g}', fontsize='small', padding=3)
  panel.axvline(1, color='0.45', linewidth=1, linestyle='--', zorder=0)
  panel.set_yticks(range(len(labels)), labels, fontsize='small')
  panel.set_ylim(len(labels) - 0.5, -0.5)
  panel.margins(x=0.12)


def _draw_cpu(rows: Sequence[Row]) -> figure.Figure:
  """Speed and memory of `xla` relative to `recurrent`: a column per size."""
  sizes = _unique(_sizes(row) for row in rows)
  labels = _unique(_label(row) for row in rows)
  drawing = figure.Figure(figsize=(5.4 * len(sizes), 11), layout='constrained')
  panels = drawing.subplots(
    len(_PANELS), len(sizes), sharex='row', sharey='row', squeeze=False
  )
  for line, (value, title) in zip(panels, _PANELS, strict=True):
    for panel, size in zip(line, sizes, strict=True):
      chosen = [row for row in rows if _sizes(row) == size]
      _draw_bars(panel, chosen, value, labels)
      panel.set_xlabel(title)
  for panel, size in zip(panels[0], sizes, strict=True):
    panel.set_title(size, fontsize='medium')
  drawing.legend(
    *panels[0, 0].get_legend_handles_labels(),
    frameon=False,
    loc='outside upper right',
  )
  drawing.suptitle(f'xla against recurrent, one run on {rows[0]["device"]}')
  return drawing


def _log_lengths(panel: axes.Axes, lengths: Sequence[int]) -> None:
  panel.set_xscale('log', base=2)
  labels = [f'{n // 1024}k' if n >= 1024 else str(n) for n in lengths]
  panel.set_xticks(lengths, labels)
  panel.xaxis.set_minor_locator(ticker.NullLocator())
  panel.set_xlabel('length T')


def _draw_length(rows: Sequence[Row]) -> figure.Figure:
  """Time and memory of `xla` by length, beside a line of slope 1."""
  drawing = figure.Figure(figsize=(9.5, 4.2), layout='constrained')
  panels = drawing.subplots(1, 2)
  values = (
    ('median_ms', 1, 'time (ms)'),
    ('temp_bytes', 2**20, 'temporary memory (MiB)'),
  )
  rows = [row for row in rows if 'median_ms' in row['results']['xla']]
  for panel, (field, unit, title) in zip(panels, values, strict=True):
    for variant in _unique(row['variant'] for row in rows):
      points = sorted(
        (row['shape']['T'], row['results']['xla'][field] / unit)
        for row in rows
        if row['variant'] == variant
      )
      lengths, heights = np.array(points).T
      panel.plot(lengths, heights, marker='o', markersize=4, label=variant)
    panel.plot(
      lengths,
      heights[-1] / lengths[-1] * lengths,
      color=_REFERENCE_COLOUR,
      linestyle='--',
      zorder=0,
      label='in proportion to T',
    )
    panel.set_yscale('log')
    panel.yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
    _log_lengths(panel, [int(n) for n in lengths])
    panel.set_ylabel(title)
    panel.grid(alpha=0.25)
  panels[0].legend(frameon=False)
  shape = rows[0]['shape']
  drawing.suptitle(
    f'{rows[0]["op"]}, xla, forward + backward, B {shape["B"]}, '
    f'H {shape["HV"]}, K = V = {shape["K"]}, {shape["dtype"]}, '
    f'{rows[0]["device"]}'
  )
  return drawing


def _draw_paper_panel(panel: axes.Axes, rows: Sequence[Row], dim: int) -> None:
  panel.plot(
    PAPER_LENGTHS,
    PAPER_SPEED_UPS[dim],
    color=_REFERENCE_COLOUR,
    marker='s',
    markersize=4,
    label='the paper, on its GPU',
  )
  rows = [row for row in rows if row['shape']['K'] == dim]
  run = [row for row in rows if row['speed_up'] is not None]
  missing = [row['shape']['T'] for row in rows if row['speed_up'] is None]
  panel.plot(
    [row['shape']['T'] for row in run],
    [row['speed_up'] for row in run],
    color=_COLOURS['forward_backward'],
    marker='o',
    label='here',
  )
  if missing:
    panel.plot(
      missing,
      [0.03] * len(missing),
      color='tab:red',
      marker='x',
      linestyle='',
      transform=panel.get_xaxis_transform(),
      label='not run here: see the rows',
    )
  _log_lengths(panel, PAPER_LENGTHS)
  by = ', '.join(_unique(row['compared'][1] for row in rows))
  title = f'head dimension {dim}' + (f', here by {by}' if by else '')
  panel.set_title(title, fontsize='medium')
  panel.grid(alpha=0.25)


def _draw_paper(rows: Sequence[Row]) -> figure.Figure:
  """Speed-up by length, a panel per head dimension, the paper's in grey."""
  drawing = figure.Figure(figsize=(11, 4.2), layout='constrained')
  panels = drawing.subplots(1, len(PAPER_SPEED_UPS), sharey=True)
  for panel, dim in zip(panels, PAPER_SPEED_UPS, strict=True):
    _draw_paper_panel(panel, rows, dim)
  panels[0].set_yscale('log')
  panels[0].yaxis.set_major_formatter(ticker.StrMethodFormatter('{x:g}'))
  panels[0].set_ylabel('speed-up of chunkwise over recurrent')
  labels = [panel.get_legend_handles_labels() for panel in panels]
  handles = {name: h for pair in labels for h, name in zip(*pair, strict=True)}
  drawing.legend(
    handles.values(),
    handles,
    frameon=False,
    loc='outside lower center',
    ncols=3,
  )
  first = rows[0]
  drawing.suptitle(
    f'{first["op"]}, {first["pass"].replace("_", " + ")}, '
    f'{first["shape"]["dtype"]}: {first["tokens"]} tokens of width '
    f'{first["model_width"]} on {first["device"]}; the paper: 16384 of 2048'
  )
  return drawing


def _shape_label(row: Row) -> str:
  name = row['shape']['name'].replace('_', ' ')
  return name if row['variant'] == 'plain' else f'{name}\n{row["variant"]}'


def _draw_published(panel: axes.Axes, rows: Sequence[Row]) -> None:
  """Marks published times in grey, as ticks across their bars."""
  published = [row.get('published_ms') or np.nan for row in rows]
  panel.plot(
    published,
    range(len(rows)),
    color=_REFERENCE_COLOUR,
    marker='|',
    markersize=22,
    markeredgewidth=2.5,
    linestyle='',
    label='published (FlashQLA, H200)',
  )


def _draw_gpu(rows: Sequence[Row]) -> figure.Figure:
  """Median times by shape and implementation, a panel per pass, as bars."""
  passes = _unique(row['pass'] for row in rows)
  names = _unique(name for row in rows for name in row['results'])
  drawing = figure.Figure(
    figsize=(1 + 5 * len(passes), 5.5), layout='constrained'
  )
  panels = drawing.subplots(1, len(passes), squeeze=False)[0]
  for panel, pass_name in zip(panels, passes, strict=True):
    shown = [row for row in rows if row['pass'] == pass_name]
    for i, name in enumerate(names):
      places = np.arange(len(shown)) + 0.8 * (i + 0.5) / len(names) - 0.4
      times = [
        row['results'].get(name, {}).get('median_ms', np.nan) for row in shown
      ]
      panel.barh(places, times, 0.8 / len(names), label=name)
    panel.tick_params(labelleft=True)
    panel.set_ylim(max(2, len(shown)) - 0.5, -0.5)
    panel.set_yticks(
      range(len(shown)),
      [_shape_label(row) for row in shown],
    )
    _draw_published(panel, shown)
    panel.set_xscale('log')
    # Whole decades: bars of nearly equal times would look far apart.
    edges = np.log10(panel.dataLim.intervalx.clip(panel.dataLim.minposx))
    panel.set_xlim(10.0 ** np.floor(edges[0]), 10.0 ** np.ceil(edges[1]))
    panel.xaxis.set_minor_formatter(ticker.NullFormatter())
    panel.set_xlabel('median milliseconds of a call')
    panel.set_title(pass_name.replace('_', ' + '), fontsize='medium')
  drawing.legend(
    *panels[0].get_legend_handles_labels(),
    frameon=False,
    loc='outside lower center',
    ncols=len(names) + 1,
  )
  drawing.suptitle(f'{rows[0]["op"]} on {rows[0]["device"]}')
  return drawing


_DRAW: Mapping[str, Callable[[Sequence[Row]], figure.Figure]] = {
  'cpu': _draw_cpu,
  'length': _draw_length,
  'paper': _draw_paper,
  'gpu': _draw_gpu,
}


def draw_kernels(rows: Sequence[Row], path: str | os.PathLike) -> None:
  """Draws the figure of a suite.

  `cpu`: speed and memory of `xla` relative to `recurrent`, as bars. `length`:
  both of `xla` by length. `paper`: the speed-up beside the paper's. `gpu`: the
  implementations' times.

  Args:
    rows: of one run of `benchmark_kernels`.
    path: where the PNG goes; an old one is replaced.

  Raises:
    ValueError: there is no row, the rows are of several suites or devices, or
      of a suite that has no figure.
  """
  origins = sorted({(row.get('suite', ''), row['device']) for row in rows})
  if len(origins) != 1:
    raise ValueError(
      'the rows must be of one suite on one device, got '
      f'{len(rows)} rows of {origins}'
    )
  suite = origins[0][0]
  if suite not in _DRAW:
    raise ValueError(
      f'the suite of the rows must be one of {tuple(_DRAW)}, got {suite!r}; '
      'measure them again with `make bench`'
    )
  drawing = _DRAW[suite](rows)
  for panel in drawing.axes:
    panel.spines[['top', 'right']].set_visible(False)
  buffer = io.BytesIO()
  drawing.savefig(buffer, format='png', dpi=150)
  atomic_file.replace(path, buffer.getvalue())
