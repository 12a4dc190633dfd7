import dataclasses
import json

import pytest

import deltanet_jax
from experiments import config as config_lib
from experiments import configs


def _through_json(config):
  return json.loads(json.dumps(config_lib.to_dict(config)))


@pytest.mark.parametrize('name', list(configs.TRAIN_LM))
def test_a_config_comes_back_from_json(name):
  config = configs.TRAIN_LM[name]()
  values = _through_json(config)
  assert config_lib.from_dict(config_lib.TrainLMConfig, values) == config


def test_tuples_come_back_as_tuples():
  data = config_lib.DataConfig(files=('a', 'b'))
  assert config_lib.from_dict(config_lib.DataConfig, _through_json(data)) == (
    data
  )


def test_every_field_comes_back():
  changed = config_lib.OptimizerConfig(
    **{
      field.name: 1 / (index + 2)
      for index, field in enumerate(
        dataclasses.fields(config_lib.OptimizerConfig)
      )
      if field.name != 'warmup_steps'
    },
    warmup_steps=7,
  )
  values = _through_json(changed)
  assert config_lib.from_dict(config_lib.OptimizerConfig, values) == changed


@pytest.mark.parametrize(
  ('section', 'field', 'value', 'message'),
  [
    ('training', 'seed', '3', 'config.training.seed must be'),
    ('training', 'seed', True, 'config.training.seed must be'),
    ('training', 'seed', 0.5, 'config.training.seed must be'),
    ('model', 'tie_embeddings', 1, 'config.model.tie_embeddings must be'),
    ('model', 'dtype', 'float8', 'config.model.dtype must be'),
    ('model', 'mixers', 'delta_net', 'config.model.mixers must be'),
    ('model', 'delta_net', 3, 'config.model.delta_net must be an object'),
    ('data', 'batch_size', 0, 'data.batch_size must be at least 1'),
    ('data', 'unheard_of', 0, 'config.data.unheard_of: no known field'),
  ],
)
def test_a_wrong_value_is_named(section, field, value, message):
  config = config_lib.TrainLMConfig(model=deltanet_jax.ModelConfig())
  values = _through_json(config)
  values[section][field] = value
  with pytest.raises(ValueError, match=message):
    config_lib.from_dict(config_lib.TrainLMConfig, values)


def test_a_missing_field_is_named():
  values = _through_json(config_lib.DataConfig())
  del values['tokenizer']
  with pytest.raises(ValueError, match='data.tokenizer: missing'):
    config_lib.from_dict(config_lib.DataConfig, values, path='data')
