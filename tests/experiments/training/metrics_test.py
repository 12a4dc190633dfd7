import json
import math
import os
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from experiments.training import metrics
from experiments.training import workdir as workdir_lib


@pytest.fixture
def workdir(tmp_path):
  return workdir_lib.Workdir(tmp_path)


def _events(workdir):
  """Returns the TensorBoard events, in the order of the files' names."""
  events = []
  for path in sorted(workdir.tensorboard.iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def _shown_points(workdir):
  """Returns (tag, step) as TensorBoard shows it: a restart purges."""
  points = []
  for event in _events(workdir):
    if event.HasField('session_log'):
      points = [point for point in points if point[1] < event.step]
    points += [(value.tag, event.step) for value in event.summary.value]
  return points


def test_rows_read_back_exactly(workdir):
  values = {
    'loss': 0.1 + 0.2,
    'tiny': 5e-324,
    'tokens': 2**60 + 1,
    'float32': np.float32(0.1),
  }
  with metrics.MetricsWriter(workdir) as writer:
    writer.write('train', 3, values)
  (row,) = metrics.read_rows(workdir.metrics)
  assert row == {'kind': 'train', 'step': 3} | values


def test_values_that_are_not_finite_are_valid_json(workdir):
  values = {'a': math.nan, 'b': math.inf, 'c': -math.inf}
  with metrics.MetricsWriter(workdir) as writer:
    writer.write('eval', 0, values)

  def refuse(constant):
    raise AssertionError(constant)

  json.loads(workdir.metrics.read_text(), parse_constant=refuse)
  (row,) = metrics.read_rows(workdir.metrics)
  assert math.isnan(row['a']) and row['b'] == math.inf and row['c'] == -math.inf


def test_a_row_is_on_its_way_when_write_returns(workdir):
  with metrics.MetricsWriter(workdir) as writer:
    writer.write('train', 1, {'loss': 2.0})
    assert len(metrics.read_rows(workdir.metrics)) == 1
    assert _shown_points(workdir) == [('train/loss', 1)]


def test_sync_brings_the_file_to_the_disk(workdir, monkeypatch):
  synced = []

  def note(descriptor):
    synced.append(os.fstat(descriptor))

  with metrics.MetricsWriter(workdir) as writer:
    writer.write('train', 1, {'loss': 2.0})
    monkeypatch.setattr(os, 'fsync', note)
    writer.sync()
    (file,) = synced
  assert os.path.samestat(file, workdir.metrics.stat())
  assert file.st_size == workdir.metrics.stat().st_size


def test_a_resumed_run_has_one_row_a_step(workdir):
  with metrics.MetricsWriter(workdir) as writer:
    for step in range(1, 6):
      writer.write('train', step, {'loss': 1.0})
    writer.write('eval', 3, {'bits_per_byte': 2.0})
    writer.write('eval', 5, {'bits_per_byte': 2.0})
  with workdir.metrics.open('a') as file:
    file.write('{"kind": "train", "st')
  with metrics.MetricsWriter(workdir) as writer:
    writer.truncate_after(3)
    assert writer.has('eval', 3) and not writer.has('eval', 5)
    for step in range(4, 7):
      writer.write('train', step, {'loss': 0.5})
    writer.write('eval', 5, {'bits_per_byte': 1.0})
  rows = metrics.read_rows(workdir.metrics)
  train = [row for row in rows if row['kind'] == 'train']
  assert [row['step'] for row in train] == [1, 2, 3, 4, 5, 6]
  assert [row['loss'] for row in train] == [1.0] * 3 + [0.5] * 3
  assert sorted(_shown_points(workdir)) == sorted(
    [('train/loss', step) for step in range(1, 7)]
    + [('eval/bits_per_byte', step) for step in (3, 5)]
  )


def test_a_torn_line_does_not_join_the_next(workdir):
  whole = '{"kind": "train", "step": 1, "loss": 1.50}\n'
  workdir.metrics.write_text(whole + '{"kind": "tra')
  assert len(metrics.read_rows(workdir.metrics)) == 1
  with metrics.MetricsWriter(workdir) as writer:
    writer.write('train', 2, {'loss': 1.0})
  assert workdir.metrics.read_text().startswith(whole)
  assert [row['step'] for row in metrics.read_rows(workdir.metrics)] == [1, 2]


@pytest.mark.parametrize(
  'line', ['{"kind": "tra', '[1]', '{"step": 1}', '{"kind": "train"}', '']
)
def test_damage_elsewhere_is_named_and_kept(workdir, line):
  text = '{"kind": "eval", "step": 1}\n' + line + '\n'
  workdir.metrics.write_text(text)
  with pytest.raises(ValueError, match='metrics.jsonl, line 2'):
    metrics.MetricsWriter(workdir)
  assert workdir.metrics.read_text() == text


def test_no_row_is_written_twice(workdir):
  for _ in range(2):
    with metrics.MetricsWriter(workdir) as writer:
      if not writer.has('eval', 10):
        writer.write('eval', 10, {'loss': 1.0})
      writer.write('train', 10 + len(workdir.metrics.read_bytes()), {})
      with pytest.raises(ValueError, match='eval row of step 10 is written'):
        writer.write('eval', 10, {'loss': 1.0})
  steps = [row['step'] for row in metrics.read_rows(workdir.metrics)]
  assert steps.count(10) == 1


@pytest.mark.parametrize(
  ('kind', 'values', 'message'),
  [('test', {}, 'kind must be'), ('train', {'step': 1.0}, 'may be called')],
)
def test_a_row_of_another_form_is_refused(workdir, kind, values, message):
  with metrics.MetricsWriter(workdir) as writer:
    with pytest.raises(ValueError, match=message):
      writer.write(kind, 1, values)


def test_a_run_without_metrics_has_no_rows(workdir):
  assert metrics.read_rows(workdir.metrics) == []
