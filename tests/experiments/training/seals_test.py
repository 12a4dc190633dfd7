"""Tests of the seal: any change of any file is seen."""

import json
import pathlib

import pytest

from experiments.training import seals


@pytest.fixture
def sealed(tmp_path) -> pathlib.Path:
  (tmp_path / 'inner').mkdir()
  (tmp_path / 'a.bin').write_bytes(bytes(range(64)))
  (tmp_path / 'inner' / 'b.json').write_text('{"x": 1}')
  (tmp_path / 'empty').touch()
  seals.seal(tmp_path)
  return tmp_path


def test_a_fresh_seal_verifies_and_leaves_no_other_file(sealed):
  assert seals.damage(sealed) is None
  names = {p.name for p in sealed.rglob('*') if p.is_file()}
  assert names == {'a.bin', 'b.json', 'empty', seals.MANIFEST}


@pytest.mark.parametrize('name', ['a.bin', 'inner/b.json', seals.MANIFEST])
def test_a_flipped_bit_is_found_or_harmless(sealed, name):
  path = sealed / name
  good = path.read_bytes()
  # Seven is prime to eight: over the bytes, every bit has its turn.
  for index in range(0, 8 * len(good), 7):
    damaged = bytearray(good)
    damaged[index // 8] ^= 1 << index % 8
    path.write_bytes(damaged)
    found = seals.damage(sealed)
    if found is None:
      # White space of the manifest: it means the same.
      assert name == seals.MANIFEST
      assert json.loads(damaged) == json.loads(good)
    else:
      assert name in found


@pytest.mark.parametrize(
  'name', ['a.bin', 'empty', 'inner/b.json', seals.MANIFEST]
)
def test_a_deleted_file_is_found(sealed, name):
  (sealed / name).unlink()
  assert name in seals.damage(sealed)


def test_an_extra_file_is_found(sealed):
  (sealed / 'inner' / 'c').touch()
  assert seals.damage(sealed) == 'inner/c: unexpected'


@pytest.mark.parametrize('name', ['a.bin', 'inner/b.json', seals.MANIFEST])
def test_a_truncated_file_is_found(sealed, name):
  path = sealed / name
  path.write_bytes(path.read_bytes()[:-1])
  assert name in seals.damage(sealed)


@pytest.mark.parametrize('text', ['', '[]', '{}', 'null', '{"files": 1}'])
def test_a_manifest_of_another_form_is_damage(sealed, text):
  (sealed / seals.MANIFEST).write_text(text)
  assert seals.MANIFEST in seals.damage(sealed)


def test_without_contents_sizes_and_names_are_compared(sealed):
  (sealed / 'a.bin').write_bytes(bytes(64))
  assert seals.damage(sealed, read_contents=False) is None
  (sealed / 'a.bin').write_bytes(bytes(63))
  assert 'a.bin' in seals.damage(sealed, read_contents=False)
