import os

import pytest

from experiments import atomic_file


@pytest.mark.parametrize('data', ['naïve\n', b'\x00\xff'])
def test_contents_are_replaced(tmp_path, data):
  path = tmp_path / 'file'
  path.write_bytes(b'old and longer')
  atomic_file.replace(path, data)
  assert path.read_bytes() == (
    data if isinstance(data, bytes) else data.encode()
  )
  assert os.listdir(tmp_path) == ['file']


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
  path = tmp_path / 'file'
  path.write_bytes(b'old')

  def fail(descriptor):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'fsync', fail)
  with pytest.raises(OSError, match='disk full'):
    atomic_file.replace(path, b'new')
  assert path.read_bytes() == b'old'
  assert os.listdir(tmp_path) == ['file']
