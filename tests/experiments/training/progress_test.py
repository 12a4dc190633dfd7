import io

import pytest

from experiments.training import progress


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def _progress(tmp_path, stream, times=(0.0, 10.0, 20.0)):
  return progress.Progress(
    1000, tmp_path / 'log.txt', stream=stream, clock=iter(times).__next__
  )


def test_elsewhere_every_update_is_a_line_and_so_in_the_log(tmp_path):
  stream = io.StringIO()
  with _progress(tmp_path, stream) as shown:
    shown.update(100, loss=2.5, tokens_per_second=12345.6)
    shown.note('checkpoint 100')
    shown.update(200, loss=2.25, bits_per_byte=1.5, tokens_per_second=12345.6)
  assert stream.getvalue() == (
    'step 100/1,000  loss 2.5000  12,346 tokens/s  ? left\n'
    'checkpoint 100\n'
    'step 200/1,000  loss 2.2500  held-out 1.5000 bits/byte  '
    '12,346 tokens/s  1m20s left\n'
  )
  assert (tmp_path / 'log.txt').read_text() == stream.getvalue()


def test_on_a_terminal_one_line_is_rewritten(tmp_path, monkeypatch):
  monkeypatch.setenv('COLUMNS', '20')
  stream = _Terminal()
  with _progress(tmp_path, stream) as shown:
    shown.update(1, loss=2.5, tokens_per_second=1)
    shown.note('saved')
    shown.update(2, loss=2.5, tokens_per_second=1)
  assert stream.getvalue() == (
    '\r\x1b[Kstep 1/1,000  loss '
    '\r\x1b[Ksaved\nstep 1/1,000  loss '
    '\r\x1b[Kstep 2/1,000  loss \n'
  )


def test_a_resumed_run_goes_on_in_its_log(tmp_path):
  for text in ('first', 'second'):
    with _progress(tmp_path, io.StringIO()) as shown:
      shown.note(text)
  assert (tmp_path / 'log.txt').read_text() == 'first\nsecond\n'


def test_a_line_is_out_before_the_next(tmp_path):
  buffer = io.BytesIO()
  stream = io.TextIOWrapper(buffer)
  with _progress(tmp_path, stream) as shown:
    shown.note('saved')
    assert buffer.getvalue() == b'saved\n'
    assert (tmp_path / 'log.txt').read_text() == 'saved\n'


def test_a_second_close_does_nothing(tmp_path):
  stream = _Terminal()
  with _progress(tmp_path, stream) as shown:
    shown.update(1, loss=2.5, tokens_per_second=1)
    shown.close()
  assert stream.getvalue().count('\n') == 1


@pytest.mark.parametrize(
  ('seconds', 'expected'),
  [(0.4, '0s'), (59.6, '1m00s'), (7500, '2h05m'), (273_600, '3d04h')],
)
def test_durations(seconds, expected):
  assert progress.format_duration(seconds) == expected
