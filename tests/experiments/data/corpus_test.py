import pytest

from experiments.data import corpus
from experiments.data import text_files


@pytest.fixture(scope='module')
def files():
  return corpus.default_files()


def test_ids_are_machine_independent_and_sorted(files):
  ids = [file.id for file in files]
  assert 'stdlib/json/decoder.py' in ids
  assert 'jax/_src/api.py' in ids
  assert ids == sorted(set(ids))
  assert {i.split('/')[0] for i in ids} == {'stdlib', *corpus.PACKAGES}


def test_tests_and_installed_packages_are_left_out(files):
  parts = {part for file in files for part in file.id.split('/')}
  assert not parts & {'test', 'tests', 'site-packages', '__pycache__'}


def test_it_is_megabytes_of_readable_text(files):
  documents = text_files.Documents(files)
  assert 2e7 < sum(len(d.text) for d in documents) < 1e8


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(corpus, 'PACKAGES', ('no_such_package',))
  with pytest.raises(ValueError, match='no_such_package'):
    corpus.default_files()
