import signal

import pytest

from experiments.training import shutdown


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('times', [1, 2])
def test_a_signal_becomes_a_request(number, times):
  with shutdown.requested() as stop:
    assert not stop
    assert stop.name == ''
    for _ in range(times):
      signal.raise_signal(number)
    assert stop
    assert stop.name == number.name


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_handlers_return_to_what_they_were(number):
  def before(*unused_args):
    pass

  first = signal.signal(number, before)
  try:
    with pytest.raises(RuntimeError, match='of the block'):
      with shutdown.requested():
        assert signal.getsignal(number) is not before
        raise RuntimeError('of the block')
    assert signal.getsignal(number) is before
  finally:
    signal.signal(number, first)


def test_other_signals_are_left_alone():
  before = signal.getsignal(signal.SIGHUP)
  with shutdown.requested():
    assert signal.getsignal(signal.SIGHUP) is before
