import pytest

from experiments.training import goodput


@pytest.fixture
def clock(monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(goodput.time, 'time', lambda: now[0])
  return now


def train_rows(counted):
  return [{'kind': 'train', 'step': i} | c for i, c in enumerate(counted, 1)]


def test_the_first_step_of_a_start_is_not_productive(clock):
  counter = goodput.Goodput(900.0)
  clock[0] = 920.0
  assert counter.add(10.0) == {'goodput': 0.0, 'wall_seconds': 20.0}
  clock[0] = 930.0
  assert counter.add(10.0) == {
    'goodput': pytest.approx(10 / 30),
    'wall_seconds': 30.0,
  }


def test_it_goes_on_over_restarts_and_lost_steps_do_not_count(clock, tmp_path):
  path = tmp_path / 'clock.json'
  first = goodput.first_start(path)
  assert first == 1000.0
  counter, rows = goodput.Goodput(first), []
  for _ in range(5):
    clock[0] += 2
    rows.append(counter.add(2.0))
  # Killed; step 3 was the last in a checkpoint; a minute in a queue.
  kept = train_rows(rows[:3]) + [{'kind': 'eval', 'step': 3}]
  clock[0] += 60
  assert goodput.first_start(path) == first
  counter = goodput.Goodput(first, goodput.productive_seconds(kept))
  clock[0] += 2
  counter.add(2.0)
  clock[0] += 2
  assert counter.add(2.0) == {
    'goodput': pytest.approx((2 + 2 + 2) / 74),
    'wall_seconds': 74.0,
  }


def test_a_clock_that_went_back_gives_no_share_above_one(clock):
  counter = goodput.Goodput(clock[0] + 500)
  counter.add(1.0)
  assert counter.add(1.0)['goodput'] == 1.0


def test_no_rows_are_no_seconds():
  assert goodput.productive_seconds([]) == 0
  assert goodput.productive_seconds([{'kind': 'train', 'step': 1}]) == 0


def test_an_unreadable_clock_is_refused(tmp_path):
  path = tmp_path / 'clock.json'
  for text in ('{', '[]', '{"first_start": null}'):
    path.write_text(text)
    with pytest.raises(ValueError, match='delete it'):
      goodput.first_start(path)
