"""Tables of the rows that `benchmarking` yields."""

from collections.abc import Iterable, Iterator

from experiments import benchmarking
from experiments import kernel_checks
from experiments import result_rows

Row = result_rows.Row

MOST_GROWTH = 8.8

_COLUMNS = (
  ('op', '<24'),
  ('variant', '<15'),
  ('sizes', '<16'),
  ('pass', '<18'),
  ('by', '<10'),
  ('median ms', '>11'),
  ('min ms', '>11'),
  ('temp MiB', '>10'),
  ('GFLOP/s', '>10'),
  ('GB/s', '>8'),
  ('of peak', '>8'),
  ('speed-up', '>9'),
  ('over fla', '>9'),
  ('published', '>10'),
)


def growth(found: Iterable[Row]) -> Iterator[Row]:
  """Yields how time and temporary memory of `xla` grow from T to 8 T.

  Rows differ in T alone, within an op and its variant. Times are those of the
  fastest calls, which other load disturbs least.
  """
  curves: dict[tuple[str, str], dict[int, Row]] = {}
  for row in found:
    if 'min_ms' in row['results'][benchmarking.CHUNKWISE]:
      curve = curves.setdefault((row['op'], row['variant']), {})
      curve[row['shape']['T']] = row['results'][benchmarking.CHUNKWISE]
  for (op, variant), curve in curves.items():
    for length in sorted(curve):
      if 8 * length in curve:
        short, long = curve[length], curve[8 * length]
        yield {
          'op': op,
          'variant': variant,
          'T': length,
          'time': long['min_ms'] / short['min_ms'],
          'memory': long['temp_bytes'] / short['temp_bytes'],
        }


def format_growth(found: Row) -> str:
  """Returns a line of `growth`, held against its limit."""
  most = max(found['time'], found['memory'])
  verdict = 'within' if most <= MOST_GROWTH else 'ABOVE'
  return (
    f'{found["op"]} {found["variant"]}, T = {found["T"]}: time(8T)/time(T) '
    f'{found["time"]:.2f}, memory {found["memory"]:.2f}, {verdict} '
    f'{MOST_GROWTH}'
  )


def growth_lines(found: Iterable[Row]) -> Iterator[str]:
  """Yields a line for all that `growth` yields."""
  return map(format_growth, growth(found))


def _line(values: Iterable[str]) -> str:
  return ''.join(
    f'{value:{width}}'
    for value, (_, width) in zip(values, _COLUMNS, strict=True)
  )


def header() -> str:
  """Returns the heading of the table."""
  return _line(name for name, _ in _COLUMNS)


def format_row(row: Row) -> Iterator[str]:
  """Yields a line under `header` per implementation, or one of a check."""
  if row['kind'] == 'kernel_check':
    yield kernel_checks.format_row(row)
    return
  start = (row['op'], row['variant'], row['shape']['name'], row['pass'])
  for name, result in row['results'].items():
    if 'reason' in result:
      yield _line((*start, name, *[''] * 9)).rstrip() + f'  {result["reason"]}'
      continue
    is_compared = name == row['compared'][1]
    speed_up, fla_ratio, published = (
      row[field] if is_compared else None
      for field in ('speed_up', 'fla_ratio', 'published_ms')
    )
    yield _line(
      (
        *start,
        name,
        f'{result["median_ms"]:.3f}',
        f'{result["min_ms"]:.3f}',
        f'{result["temp_bytes"] / 2**20:.1f}' if 'temp_bytes' in result else '',
        f'{result["flops_per_s"] / 1e9:.1f}',
        f'{result["bytes_per_s"] / 1e9:.1f}',
        f'{result["peak_share"]:.1%}',
        '' if speed_up is None else f'{speed_up:.1f}',
        '' if fla_ratio is None else f'{fla_ratio:.2f}',
        '' if published is None else f'{published:.3f}',
      )
    )
