import pytest

from experiments import chips


@pytest.mark.parametrize(
  ('kind', 'name'),
  [
    ('TPU v4', 'v4'),
    ('TPU v5', 'v5p'),
    ('TPU v5p', 'v5p'),
    ('TPU v5 lite', 'v5e'),
    ('TPU v6 lite', 'v6e'),
    ('NVIDIA H200', 'h200'),
    ('NVIDIA H100 80GB HBM3', 'h100'),
    ('NVIDIA A100-SXM4-80GB', 'a100'),
  ],
)
def test_a_chip_is_found_by_what_jax_calls_it(kind, name):
  assert chips.of_kind(kind).name == name


@pytest.mark.parametrize('kind', ['cpu', 'NVIDIA A100-SXM4-40GB', 'TPU v9'])
def test_others_are_not_known(kind):
  assert chips.of_kind(kind) is None


@pytest.mark.parametrize(
  ('name', 'chip', 'shape'),
  [
    ('v5p:4x4x4', 'v5p', (4, 4, 4)),
    ('v5e:16x16', 'v5e', (16, 16)),
    ('H200:64', 'h200', (64,)),
    ('h200', 'h200', (1,)),
  ],
)
def test_targets_are_read(name, chip, shape):
  found = chips.target(name)
  assert (found.chip.name, found.shape) == (chip, shape)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v7:4', 'must begin with one of v4, v5e'),
    ('v5p', 'a TPU and the shape of its slice'),
    ('v5p:4x', 'a TPU and the shape of its slice'),
    ('h200:0', 'a TPU and the shape of its slice'),
    ('h200:12', 'whole hosts of 8'),
    ('h200:2x4', 'whole hosts of 8'),
  ],
)
def test_what_is_no_target_is_refused(name, message):
  with pytest.raises(ValueError, match=message):
    chips.target(name)
