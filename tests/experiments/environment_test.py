import importlib.metadata
import subprocess

import jax
import pytest

from experiments import environment


def test_versions_tell_what_is_missing(monkeypatch):
  monkeypatch.setattr(environment, 'PACKAGES', ('jax', 'no-such-package'))
  versions = environment.versions()
  assert versions['jax'] == importlib.metadata.version('jax')
  assert versions['no-such-package'] == 'not installed'


def _fake_git(monkeypatch, answers):
  def run(command, **unused_options):
    answer = answers[command[3]]
    if isinstance(answer, Exception):
      raise answer
    return subprocess.CompletedProcess(command, 0, stdout=answer)

  monkeypatch.setattr(subprocess, 'run', run)


@pytest.mark.parametrize(
  ('status', 'expected'), [('', 'abc'), (' M setup.cfg\n', 'abc-modified')]
)
def test_commit_says_whether_files_differ(monkeypatch, status, expected):
  _fake_git(monkeypatch, {'rev-parse': 'abc\n', 'status': status})
  assert environment.commit() == expected


@pytest.mark.parametrize(
  'error',
  [FileNotFoundError('git'), subprocess.CalledProcessError(128, 'git')],
)
def test_commit_is_unknown_without_git(monkeypatch, error):
  _fake_git(monkeypatch, {'rev-parse': error})
  assert environment.commit() == 'unknown'


def test_commit_of_a_copy_is_told(monkeypatch):
  _fake_git(monkeypatch, {'rev-parse': 'abc\n', 'status': ''})
  monkeypatch.setenv('SOURCE_COMMIT', 'def')
  assert environment.commit() == 'def'


def test_devices_counts_each_kind():
  count = len(jax.devices())
  assert environment.devices() == f'{count} x {jax.devices()[0].device_kind}'


def test_the_driver_is_the_first_gpus_or_none(monkeypatch):
  def run(command, **unused_options):
    assert command[0] == 'nvidia-smi'
    return subprocess.CompletedProcess(command, 0, stdout='580.95\n580.95\n')

  monkeypatch.setattr(subprocess, 'run', run)
  environment.driver.cache_clear()
  assert environment.driver() == '580.95'
  monkeypatch.setattr(subprocess, 'run', lambda *_, **__: 1 / 0)
  assert environment.driver() == '580.95'  # Asked once.
  environment.driver.cache_clear()

  def missing(*_, **unused_options):
    raise FileNotFoundError('nvidia-smi')

  monkeypatch.setattr(subprocess, 'run', missing)
  assert environment.driver() is None
  environment.driver.cache_clear()


def test_glibc_tunables_are_told_where_there_are_any(monkeypatch):
  monkeypatch.setenv('GLIBC_TUNABLES', '')
  assert environment.glibc_tunables() is None
  monkeypatch.setenv('GLIBC_TUNABLES', 'glibc.malloc.hugetlb=1')
  assert environment.glibc_tunables() == 'glibc.malloc.hugetlb=1'
