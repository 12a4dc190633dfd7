import random
import signal

import pytest

from experiments.training import agreed_stop
from experiments.training import processes
from experiments.training import shutdown


@pytest.fixture
def store(monkeypatch):
  """Stands for the store that the processes of a run share."""
  values = {}
  monkeypatch.setattr(processes, 'set_once', values.setdefault)
  monkeypatch.setattr(processes, 'try_get', values.get)
  monkeypatch.setattr(processes.Group, 'show_life', lambda group: None)
  return values


class Process:
  """One of several that run steps 0, 1, ... as the training loop does."""

  def __init__(self, index, count):
    self.request = shutdown.ShutdownRequest()
    group = processes.Group(index=index, count=count)
    self.stop = agreed_stop.AgreedStop(self.request, group)
    self.begun = -1  # The step whose start has looked for a request.
    self.given = -1  # The last step that the device has got.
    self.stopped_at = None

  def advance(self, peers):
    """Begins a step, or gives it to the device, if that is possible."""
    if self.stopped_at is not None:
      return
    if self.begun == self.given:
      step = self.begun + 1
      if all(peer.given >= step - 2 for peer in peers):
        self.begun = step
        if self.stop.at(step):
          self.stopped_at = step
    else:
      self.given = self.begun


@pytest.mark.parametrize('seed', range(200))
def test_all_end_at_the_same_step_in_any_order_of_events(store, seed):
  draw = random.Random(seed)
  peers = [Process(index, 3) for index in range(3)]
  moment = draw.randrange(60)
  asked = draw.sample(peers, draw.randint(1, 3))
  for tick in range(2000):
    if tick >= moment and asked and draw.random() < 0.5:
      asked.pop().request.receive(signal.SIGTERM, None)
    draw.choice(peers).advance(peers)
  steps = {peer.stopped_at for peer in peers}
  assert len(steps) == 1
  assert steps != {None}
  assert {peer.stop.name for peer in peers} == {'SIGTERM'}


def test_a_request_before_the_first_step_reaches_all(store):
  first, second = Process(0, 2), Process(1, 2)
  assert not first.stop
  second.request.receive(signal.SIGINT, None)
  second.stop.say(0)
  first.stop._looked = -100.0
  assert first.stop
  assert first.stop.name == 'SIGINT'
  assert first.stop.at(0)
  assert second.stop.at(0)


def test_one_process_alone_stops_at_once():
  request = shutdown.ShutdownRequest()
  stop = agreed_stop.AgreedStop(request, processes.Group())
  stop.begin()
  assert not stop
  assert not stop.at(7)
  request.receive(signal.SIGTERM, None)
  assert stop
  assert stop.at(7)
  assert stop.name == 'SIGTERM'
