"""Tells how far a run is: one live line on a terminal, lines elsewhere."""

from collections.abc import Callable
import pathlib
import shutil
import sys
import time
from typing import TextIO

_ERASE_LINE = '\r\x1b[K'


def format_duration(seconds: float) -> str:
  """Returns seconds as '5s', '3m20s', '2h05m' or '3d04h'."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days}d{hours:02}h'
  if hours:
    return f'{hours}h{minutes:02}m'
  return f'{minutes}m{rest:02}s' if minutes else f'{rest}s'


class Progress:
  """Shows the steps of a run on a stream and appends them to a log file.

  On a terminal the line is rewritten in place. Elsewhere, and in the log, each
  update is a line of its own.
  """

  def __init__(
    self,
    num_steps: int,
    log_path: pathlib.Path,
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._num_steps = num_steps
    self._log = log_path.open('a')
    self._stream = sys.stderr if stream is None else stream
    self._is_terminal = self._stream.isatty()
    self._clock = clock
    self._first: tuple[int, float] | None = None
    self._live_line = ''

  def _remaining(self, step: int) -> str:
    """Returns the time left; the steps before the first update don't count.

    They hold the compilation.
    """
    now = self._clock()
    if self._first is None:
      self._first = (step, now)
    first_step, first_time = self._first
    if step == first_step:
      return '?'
    seconds_per_step = (now - first_time) / (step - first_step)
    return format_duration(seconds_per_step * (self._num_steps - step))

  def update(
    self,
    step: int,
    *,
    loss: float,
    tokens_per_second: float,
    bits_per_byte: float | None = None,
  ) -> None:
    """Shows one step: loss in nats per token, held-out bits per byte."""
    parts = [f'step {step:,}/{self._num_steps:,}', f'loss {loss:.4f}']
    if bits_per_byte is not None:
      parts.append(f'held-out {bits_per_byte:.4f} bits/byte')
    parts.append(f'{tokens_per_second:,.0f} tokens/s')
    parts.append(f'{self._remaining(step)} left')
    line = '  '.join(parts)
    self._write_log(line)
    if self._is_terminal:
      # One column less than there are: a full line would wrap.
      self._live_line = line[: shutil.get_terminal_size().columns - 1]
      self._show(f'{_ERASE_LINE}{self._live_line}')
    else:
      self._show(f'{line}\n')

  def note(self, text: str) -> None:
    """Shows a line that stays, such as an evaluation, above the live one."""
    self._write_log(text)
    if self._live_line:
      self._show(f'{_ERASE_LINE}{text}\n{self._live_line}')
    else:
      self._show(f'{text}\n')

  def _show(self, text: str) -> None:
    self._stream.write(text)
    self._stream.flush()

  def _write_log(self, line: str) -> None:
    self._log.write(f'{line}\n')
    self._log.flush()

  def close(self) -> None:
    """Leaves the live line where it is; a second call does nothing."""
    if self._live_line:
      self._show('\n')
      self._live_line = ''
    self._log.close()

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *unused_exception) -> None:
    self.close()


class NoProgress:
  """Stands for a `Progress` in the processes that show none."""

  def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
    """Does nothing."""

  def note(self, text: str) -> None:
    """Does nothing."""

  def __enter__(self) -> 'NoProgress':
    return self

  def __exit__(self, *unused_exception) -> None:
    pass
