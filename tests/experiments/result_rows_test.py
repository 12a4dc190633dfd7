"""Tests of files of results: what is written is read, damage is named."""

import json

import jax
import pytest

from experiments import environment
from experiments import result_rows

ROWS = [{'kind': 'a', 'x': 1.5}, {'kind': 'b'}, {'kind': 'a', 'x': None}]


def test_rows_are_read_as_written_all_or_of_a_kind(tmp_path):
  path = tmp_path / 'folder' / 'rows.jsonl'
  assert result_rows.read(path) == []
  result_rows.write(path, ROWS)
  assert result_rows.read(path) == ROWS
  assert result_rows.read(path, kind='a') == [ROWS[0], ROWS[2]]
  result_rows.write(path, ROWS[:1])
  assert result_rows.read(path) == ROWS[:1]
  assert [file.name for file in path.parent.iterdir()] == ['rows.jsonl']


def test_nothing_is_written_without_a_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result_rows.write(None, ROWS)
  assert not list(tmp_path.iterdir())


def _measured(length, time, *, kind='a', device='cpu'):
  shape = {'length': length}
  return {'kind': kind, 'shape': shape, 'time': time, 'device': device}


def test_rows_about_the_same_are_replaced_and_others_stay(tmp_path):
  path = tmp_path / 'rows.jsonl'
  first = [_measured(1, 1.0), _measured(2, 2.0), _measured(1, 3.0, kind='b')]
  result_rows.update(path, first, ('kind', 'shape'))
  assert result_rows.read(path) == first
  again = [_measured(3, 4.0), _measured(2, 5.0)]
  result_rows.update(path, again, ('kind', 'shape'))
  assert result_rows.read(path) == [first[0], again[1], first[2], again[0]]


def test_rows_of_two_devices_do_not_mix(tmp_path):
  path = tmp_path / 'rows.jsonl'
  result_rows.require_device(path)
  own = environment.devices()
  result_rows.write(path, [_measured(1, 1.0, device=own)])
  result_rows.require_device(path)
  result_rows.write(path, [_measured(1, 1.0, device='1 x other')])
  with pytest.raises(ValueError, match=r"alone .* got \['1 x other'\]"):
    result_rows.require_device(path)


def test_nothing_is_updated_without_a_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  result_rows.require_device(None)
  result_rows.update(None, ROWS, ('kind',))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"kind": ', 'line 2: not JSON'),
    ('3', 'line 2: must be a JSON object'),
    ('{"kind": "b"}', "line 2: must be a JSON object with a 'x'"),
  ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
  path = tmp_path / 'rows.jsonl'
  path.write_text(f'{json.dumps(ROWS[0])}\n{line}\n')
  with pytest.raises(ValueError, match=message):
    result_rows.read(path, kind='a', needs='x')


def test_the_origin_says_commit_device_versions_and_malloc(monkeypatch):
  monkeypatch.setenv('SOURCE_COMMIT', 'abc')
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
  origin = result_rows.origin()
  assert origin['commit'] == 'abc'
  assert origin['versions']['jax'] == jax.__version__
  assert origin['glibc_tunables'] == 'glibc.malloc.hugetlb=1'
  assert origin['device'] and origin['date']
