import gzip
import json
import sys

import pyarrow
from pyarrow import parquet
import pytest

from experiments.data import text_files


def read(patterns, *, max_bad_fraction=1.0, text_field='text'):
  documents = text_files.Documents(
    text_files.find_files([str(p) for p in patterns]),
    max_bad_fraction=max_bad_fraction,
    text_field=text_field,
  )
  return {d.id: d.text for d in documents}, documents


def jsonl(*texts):
  return b''.join(json.dumps({'text': t}).encode() + b'\n' for t in texts)


def test_plain_files_are_documents_kept_to_the_byte(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'a.py').write_bytes(b'x = 1\r\n\ty\n')
  (tmp_path / 'b.md').write_bytes('né'.encode())
  found, documents = read([tmp_path / '**'])
  assert found == {'b.md': 'né', 'sub/a.py': 'x = 1\r\n\ty\n'}
  assert documents.num_read == 2
  assert not documents.bad_counts


def test_ids_do_not_depend_on_the_directory(tmp_path):
  for root in ('one', 'two/deeper'):
    for name in ('x/a.txt', 'y/a.txt'):
      path = tmp_path / root / name
      path.parent.mkdir(parents=True)
      path.write_text(name)
  one, _ = read([tmp_path / 'one' / '**'])
  two, _ = read([tmp_path / 'two' / '**'])
  assert list(one) == ['x/a.txt', 'y/a.txt']
  assert one == two


def test_overlapping_patterns_give_a_file_once(tmp_path):
  (tmp_path / 'a.txt').write_text('a')
  found, documents = read([tmp_path / '*', tmp_path / '*.txt'])
  assert found == {'a.txt': 'a'}
  assert documents.num_read == 1


def test_a_pattern_without_files_is_refused(tmp_path):
  (tmp_path / 'a.txt').write_text('a')
  with pytest.raises(ValueError, match=r"no file matches '.*\.md'"):
    read([tmp_path / '*.txt', tmp_path / '*.md'])


def test_rows_carry_their_line(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(jsonl('one', 'two\r\n'))
  with gzip.open(tmp_path / 'b.jsonl.gz', 'wb') as file:
    file.write(jsonl('three'))
  found, _ = read([tmp_path / '*'])
  assert found == {
    'a.jsonl:1': 'one',
    'a.jsonl:2': 'two\r\n',
    'b.jsonl.gz:1': 'three',
  }


def test_another_text_field(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "no", "content": "yes"}\r\n')
  found, _ = read([tmp_path / '*'], text_field='content')
  assert found == {'a.jsonl:1': 'yes'}


BAD_ROWS = {
  'broken JSON': b'{"text": "a',
  "no field 'text'": b'{"body": "a"}',
  'text is not a string': b'{"text": 3}',
  'invalid UTF-8': b'{"text": "\xff"}',
  'NUL character': b'{"text": "a\\u0000b"}',
  'empty': b'{"text": ""}',
  'byte-order mark': b'\xef\xbb\xbf{"text": "a"}',
  'lone surrogate': b'{"text": "\\ud83d"}',
}


@pytest.mark.parametrize('reason', BAD_ROWS)
def test_a_bad_row_is_skipped_and_named(tmp_path, reason):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(jsonl('good') + BAD_ROWS[reason] + b'\n' + jsonl('good'))
  found, documents = read([path])
  assert list(found) == ['a.jsonl:1', 'a.jsonl:3']
  assert documents.bad_counts == {reason: 1}
  assert documents.first_bad == [f'{path}:2: {reason}']


@pytest.mark.parametrize(
  ('row', 'reason'),
  [
    (b'', 'empty'),
    (b'[1]', "no field 'text'"),
    (b'[' * 100_000, 'broken JSON'),
    (b'{"text": "\\ufeffa"}', 'byte-order mark'),
  ],
)
def test_unusual_bad_rows(tmp_path, row, reason):
  (tmp_path / 'a.jsonl').write_bytes(row + b'\n' + jsonl('good'))
  found, documents = read([tmp_path / 'a.jsonl'])
  assert list(found) == ['a.jsonl:2']
  assert documents.bad_counts == {reason: 1}


@pytest.mark.parametrize(
  ('content', 'reason'),
  [
    (b'', 'empty'),
    (b'a\0b', 'NUL character'),
    (b'\xef\xbb\xbfa', 'byte-order mark'),
    ('é'.encode('latin-1'), 'invalid UTF-8'),
  ],
)
def test_a_bad_file_is_skipped_and_named(tmp_path, content, reason):
  (tmp_path / 'a.txt').write_bytes(content)
  (tmp_path / 'b.txt').write_text('good')
  found, documents = read([tmp_path / '*'])
  assert found == {'b.txt': 'good'}
  assert documents.first_bad == [f'{tmp_path / "a.txt"}: {reason}']


def test_a_truncated_gzip_keeps_its_whole_rows(tmp_path):
  # Incompressible, so that the cut falls among the rows.
  data = gzip.compress(jsonl(*(f'{i * 7919 % 1000003}' for i in range(20000))))
  path = tmp_path / 'a.jsonl.gz'
  path.write_bytes(data[: len(data) // 2])
  found, documents = read([path])
  assert 5_000 < len(found) < 15_000
  assert found['a.jsonl.gz:5000'] == f'{4999 * 7919 % 1000003}'
  assert documents.bad_counts == {'truncated or damaged gzip': 1}
  assert documents.first_bad[0].startswith(f'{path}:{len(found) + 1}: ')


def test_a_gzip_that_is_none_is_bad(tmp_path):
  (tmp_path / 'a.jsonl.gz').write_bytes(jsonl('a'))
  found, documents = read([tmp_path / '*'])
  assert not found
  assert documents.bad_counts == {'truncated or damaged gzip': 1}


def test_a_line_of_50_megabytes_is_read(tmp_path):
  text = 'x' * 50_000_000
  (tmp_path / 'a.jsonl').write_bytes(jsonl(text, 'b'))
  found, _ = read([tmp_path / '*'])
  assert found == {'a.jsonl:1': text, 'a.jsonl:2': 'b'}


def test_too_many_bad_documents_stop_with_five_named(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(jsonl(*'abc') + b'{\n' * 7)
  with pytest.raises(text_files.BadDocumentsError) as caught:
    read([path], max_bad_fraction=0.69)
  message = str(caught.value)
  assert '7 of 10 documents' in message
  assert message.count('broken JSON') == 5
  assert f'{path}:4: broken JSON' in message
  found, _ = read([path], max_bad_fraction=0.7)
  assert len(found) == 3


def test_a_second_iteration_counts_anew(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(jsonl('a') + b'{\n')
  _, documents = read([tmp_path / '*'])
  assert [d.text for d in documents] == ['a']
  assert documents.num_read == 2
  assert documents.bad_counts == {'broken JSON': 1}
  assert len(documents.first_bad) == 1


def test_parquet_without_pyarrow_names_the_package(tmp_path, monkeypatch):
  (tmp_path / 'a.parquet').write_bytes(b'PAR1')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(ImportError, match='pyarrow'):
    read([tmp_path / '*'])


def test_parquet_rows(tmp_path):
  path = tmp_path / 'a.parquet'
  table = pyarrow.table({'text': ['one', None, 'a\0', 'four'], 'x': [1] * 4})
  parquet.write_table(table, path)
  found, documents = read([path])
  assert found == {'a.parquet:1': 'one', 'a.parquet:4': 'four'}
  assert documents.bad_counts == {
    'text is not a string': 1,
    'NUL character': 1,
  }
  with pytest.raises(ValueError, match="no column 'body'"):
    read([path], text_field='body')
  path.write_bytes(path.read_bytes()[:-10])
  found, documents = read([path])
  assert not found
  assert documents.bad_counts.total() == 1
