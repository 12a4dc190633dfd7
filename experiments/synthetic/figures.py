"""Draws the synthetic experiments with the published numbers as grey marks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import io
import os
import pathlib
from typing import Any

from matplotlib import axes
from matplotlib import figure

from experiments import atomic_file
from experiments.synthetic import published

Row = Mapping[str, Any]

_GREY = '0.6'
_MARKERS = 'osD^vPX*<>hp'


def best(rows: Iterable[Row], *, by: Callable[[Row], Any]) -> dict[Any, Row]:
  """Returns the row of the highest accuracy for every value of `by`."""
  result: dict[Any, Row] = {}
  for row in rows:
    key = by(row)
    if key not in result or row['accuracy'] > result[key]['accuracy']:
      result[key] = row
  return dict(sorted(result.items()))


def label(row: Row) -> str:
  """Returns the mixer with those of its options that the figures tell apart."""
  model, parts = row['config']['model'], [row['mixer']]
  options = model.get(row['mixer'], {})
  if row['mixer'] == 'delta_product':
    parts.append(f'{options["num_householder"]} per token')
  if 'allow_negative_eigenvalues' in options and row['name'] in (
    'parity',
    'modular_arithmetic',
    'word_problem',
  ):
    top = 2 if options['allow_negative_eigenvalues'] else 1
    parts.append(f'beta in (0, {top})')
  if row['name'] == 'regbench' and options.get('use_short_conv') is False:
    parts.append('no convolution')
  return ', '.join(parts)


def _task(row: Row) -> str:
  """Returns the sizes of the task, where several are in one figure."""
  task = row['config']['test_task']
  if row['name'] == 'mqar':
    return f'{task["sequence_length"]} tokens, {task["num_pairs"]} pairs'
  if row['name'] == 'word_problem':
    return f'word problem {task["group"]}'
  if task.get('brackets'):
    return f'{row["name"]}, brackets'.replace('_', ' ')
  return row['name'].replace('_', ' ')


def _panels(count: int, title: str):
  drawing = figure.Figure(
    figsize=(1.0 + 4.4 * count, 4.4), layout='constrained'
  )
  panels = drawing.subplots(1, count, sharey=True, squeeze=False)[0]
  for panel in panels:
    panel.grid(alpha=0.25)
    panel.spines[['top', 'right']].set_visible(False)
  drawing.suptitle(title, fontsize='medium')
  return drawing, panels


def _save(drawing: figure.Figure, path: str | os.PathLike) -> None:
  buffer = io.BytesIO()
  drawing.savefig(buffer, format='png', dpi=150)
  atomic_file.replace(path, buffer.getvalue())


def _draw_published(
  panel: axes.Axes,
  xs: Sequence[float],
  lines: Mapping[str, Sequence[float]],
) -> None:
  for marker, (name, ys) in zip(_MARKERS, lines.items(), strict=False):
    panel.plot(
      xs,
      ys,
      color=_GREY,
      marker=marker,
      linestyle=':',
      linewidth=0.8,
      label=f'{name} (published)',
    )


def _draw_lines(
  panel: axes.Axes, rows: Iterable[Row], x: Callable, names: Sequence[str]
) -> None:
  """Draws the best row of every label and x; `names` has all of the figure."""
  lines: dict[str, list[tuple[float, float]]] = {}
  for (name, at), row in best(rows, by=lambda r: (label(r), x(r))).items():
    lines.setdefault(name, []).append((at, row['accuracy']))
  for name, points in lines.items():
    number = names.index(name)
    panel.plot(
      *zip(*points, strict=True),
      marker=_MARKERS[number],
      # Smaller and smaller, so that equal points are all seen.
      markersize=max(4, 11 - 2 * number),
      color=f'C{number}',
      label=name,
    )


def _draw_legend(drawing: figure.Figure) -> None:
  """Draws a legend of all panels beside them, every name once."""
  lines = {
    line.get_label(): line
    for panel in drawing.axes
    for line in panel.get_lines()
  }
  drawing.legend(
    lines.values(), lines.keys(), fontsize=7, loc='outside right center'
  )


def _by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """Returns the rows by the sizes of their task, short rows first."""
  result: dict[str, list[Row]] = {}

  def order(row):
    task = row['config']['test_task']
    return row['name'], task.get('sequence_length', 0), _task(row)

  for row in sorted(rows, key=order):
    result.setdefault(_task(row), []).append(row)
  return result


def _width(row: Row) -> int:
  return row['config']['model']['model_width']


def draw_mqar(rows: Sequence[Row], path: str | os.PathLike) -> None:
  """Draws accuracy against width, a panel per size of the task."""
  tasks = _by_task(rows)
  names = sorted({label(row) for row in rows})
  drawing, panels = _panels(len(tasks), 'multi-query associative recall')
  for panel, (title, found) in zip(panels, tasks.items(), strict=True):
    _draw_published(panel, published.MQAR_WIDTHS, published.MQAR)
    _draw_lines(panel, found, _width, names)
    panel.set_title(f'{title}\n(published: 512 tokens, 64 pairs)', fontsize=9)
    panel.set_xscale('log', base=2)
    panel.set_xlabel('model width')
  panels[0].set_ylabel('accuracy')
  _draw_legend(drawing)
  _save(drawing, path)


def draw_mad(rows: Sequence[Row], path: str | os.PathLike) -> None:
  """Draws bars per task and mixer: the mean over settings of the best run."""
  names = sorted({label(row) for row in rows})
  drawing, (panel,) = _panels(1, 'MAD')
  drawing.set_size_inches(10, 4.4)
  width = 0.8 / len(names)
  for i, name in enumerate(names):
    xs, ys = [], []
    for j, task in enumerate(published.MAD_TASKS):
      found = [r for r in rows if label(r) == name and r['name'] == task]
      if found:
        settings = best(found, by=lambda r: str(r['config']['task']))
        values = [row['accuracy'] for row in settings.values()]
        xs.append(j + (i + 0.5) * width - 0.4)
        ys.append(sum(values) / len(values))
    panel.bar(xs, ys, width=width, label=name)
  _draw_published(panel, range(len(published.MAD_TASKS)), published.MAD)
  panel.set_xticks(
    range(len(published.MAD_TASKS)),
    [task.replace('_', ' ') for task in published.MAD_TASKS],
    fontsize=8,
  )
  panel.set_ylabel('accuracy')
  panel.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
  _save(drawing, path)


def draw_regbench(rows: Sequence[Row], path: str | os.PathLike) -> None:
  """Draws accuracy against the number of training examples."""
  drawing, (panel,) = _panels(1, 'RegBench')
  drawing.set_size_inches(8, 4.4)
  _draw_published(panel, published.REGBENCH_SIZES, published.REGBENCH)
  names = sorted({label(row) for row in rows})
  _draw_lines(
    panel, rows, lambda r: r['config']['training']['num_train'], names
  )
  panel.set_xscale('log')
  panel.set_xlabel('training examples')
  panel.set_ylabel('accuracy')
  panel.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
  _save(drawing, path)


def _draw_by_length(panel: axes.Axes, rows: Iterable[Row]) -> None:
  for name, row in best(rows, by=label).items():
    xs = [(x['first'] + x['last']) / 2 + 1 for x in row['by_position']]
    ys = [x['accuracy'] for x in row['by_position']]
    panel.plot(xs, ys, marker='o', markersize=3, label=name)


def draw_state_tracking(rows: Sequence[Row], path: str | os.PathLike) -> None:
  """Draws accuracy against length, a panel per task.

  For word problems that is the part of the examples with every token right up
  to that length.
  """
  tasks = _by_task(rows)
  drawing, panels = _panels(len(tasks), 'state tracking')
  for panel, (title, found) in zip(panels, tasks.items(), strict=True):
    if title in published.STATE_TRACKING:
      chance, scaled = published.STATE_TRACKING[title]
      lines = {
        name: [chance + (1 - chance) * y for y in ys]
        for name, ys in scaled.items()
      }
      _draw_published(panel, published.LENGTHS, lines)
    _draw_by_length(panel, found)
    task = found[0]['config']['task']
    trained = task.get('max_length') or task['length']
    panel.axvline(trained, color=_GREY, linewidth=0.8, linestyle='--')
    panel.set_title(f'{title}, trained up to {trained}', fontsize=9)
    panel.set_xlabel('length')
    panel.legend(fontsize=7)
  panels[0].set_ylabel('accuracy')
  _save(drawing, path)


# The figures by name, with the names of the runs that each is drawn of.
FIGURES: dict[str, tuple[Callable, tuple[str, ...]]] = {
  'mqar': (draw_mqar, ('mqar',)),
  'mad': (draw_mad, published.MAD_TASKS),
  'regbench': (draw_regbench, ('regbench',)),
  'state_tracking': (
    draw_state_tracking,
    ('parity', 'modular_arithmetic', 'word_problem'),
  ),
}


def draw(
  name: str, rows: Iterable[Row], directory: str | os.PathLike
) -> pathlib.Path:
  """Draws a figure of `FIGURES` into directory/NAME.png; returns that path.

  Raises:
    ValueError: no row belongs to the figure.
  """
  function, names = FIGURES[name]
  found = [row for row in rows if row['name'] in names]
  if not found:
    raise ValueError(
      f'the figure {name} needs rows of {", ".join(names)}: run '
      'experiments.sweep first'
    )
  path = pathlib.Path(directory) / f'{name}.png'
  function(found, path)
  return path
