import json
import types

import pytest

from pallas_kernels.delta_rule import mosaic_gpu_config

HOPPER = types.SimpleNamespace(device_kind='NVIDIA H999')


@pytest.fixture
def table(tmp_path, monkeypatch):
  """A copy of the table, which may be changed."""
  path = tmp_path / 'table.json'
  path.write_text(mosaic_gpu_config.TABLE.read_text())
  monkeypatch.setattr(mosaic_gpu_config, 'TABLE', path)
  mosaic_gpu_config._table.cache_clear()
  yield path
  mosaic_gpu_config._table.cache_clear()


@pytest.mark.parametrize(
  ('field', 'value'),
  [('stages', 0), ('inverse_groups', 0), ('processors', 0)],
)
def test_config_is_checked(field, value):
  with pytest.raises(ValueError, match=f'{field} must be'):
    mosaic_gpu_config.Config(**{field: value})


@pytest.mark.parametrize('key_dim', mosaic_gpu_config.HEAD_DIMS)
@pytest.mark.parametrize('value_dim', mosaic_gpu_config.HEAD_DIMS)
def test_devices_that_were_not_measured_have_a_config(key_dim, value_dim):
  config = mosaic_gpu_config.config_for(key_dim, value_dim, HOPPER)
  assert config.stages == (3 if key_dim == value_dim == 64 else 2)


def test_a_measured_device_has_its_own_rows(table):
  best = mosaic_gpu_config.Config(stages=1, inverse_groups=2)
  row = mosaic_gpu_config.row(HOPPER.device_kind, 64, 64, best)
  table.write_text(mosaic_gpu_config.merged([row]))
  assert mosaic_gpu_config.config_for(64, 64, HOPPER) == best
  assert mosaic_gpu_config.config_for(128, 128, HOPPER).stages == 2
  # Measured again, they are replaced.
  count = len(json.loads(table.read_text()))
  table.write_text(mosaic_gpu_config.merged([row]))
  assert len(json.loads(table.read_text())) == count
