import dataclasses
from typing import Literal

from absl import flags
import pytest

from deltanet_jax import config as model_config
from experiments import config as train_config
from experiments import config_flags


def _parsed(config_class, *arguments, prefix=''):
  values = flags.FlagValues()
  config_flags.define_flags(config_class, prefix=prefix, flag_values=values)
  values(['program', *arguments])
  return values


def _base():
  return train_config.TrainLMConfig(model=model_config.ModelConfig())


def _override(*arguments):
  values = _parsed(train_config.TrainLMConfig, *arguments)
  return config_flags.override(_base(), values)


def test_without_flags_nothing_changes():
  base = _base()
  values = _parsed(train_config.TrainLMConfig)
  assert config_flags.override(base, values) is base


@pytest.mark.parametrize(
  ('argument', 'path', 'expected'),
  [
    ('--model.num_layers=2', 'model.num_layers', 2),
    (
      '--model.delta_net.feature_map=relu',
      'model.delta_net.feature_map',
      'relu',
    ),
    (
      '--model.delta_net.implementation=xla',
      'model.delta_net.implementation',
      'xla',
    ),
    ('--model.norm_eps=1e-5', 'model.norm_eps', 1e-5),
    ('--model.tie_embeddings', 'model.tie_embeddings', True),
    (
      '--nomodel.delta_net.use_short_conv',
      'model.delta_net.use_short_conv',
      False,
    ),
    (
      '--model.mixers=delta_net,attention',
      'model.mixers',
      ('delta_net', 'attention'),
    ),
    ('--data.files=', 'data.files', ()),
    ('--training.seed=0', 'training.seed', 0),
  ],
)
def test_a_flag_sets_its_field_and_no_other(argument, path, expected):
  changed, plain = _override(argument), train_config.to_dict(_base())
  value, parent = changed, plain
  *parents, name = path.split('.')
  for part in parents:
    parent = parent[part]
    value = getattr(value, part)
  assert getattr(value, name) == expected
  parent[name] = list(expected) if isinstance(expected, tuple) else expected
  assert train_config.to_dict(changed) == plain


def test_flags_of_one_dataclass_are_validated_together():
  changed = _override(
    '--data.batch_size=12', '--training.gradient_accumulation_steps=3'
  )
  assert changed.data.batch_size == 12


def test_a_broken_rule_is_one_line_with_the_flags():
  with pytest.raises(ValueError) as error:
    _override('--data.batch_size=0', '--training.seed=3')
  assert str(error.value) == (
    'data.batch_size must be at least 1, got 0 '
    '(flags given: --data.batch_size=0 --training.seed=3)'
  )


def test_an_unknown_flag_names_the_nearest():
  with pytest.raises(
    flags.UnrecognizedFlagError, match='Did you mean: model.num_layers'
  ):
    _override('--model.num_layer=3')


@pytest.mark.parametrize(
  'argument',
  ['--model.num_layers=2.5', '--model.dtype=float16', '--optimizer.b1=high'],
)
def test_a_value_of_another_type_is_refused(argument):
  with pytest.raises(flags.IllegalFlagValueError, match=argument[2:8]):
    _override(argument)


def test_help_is_the_description_of_the_field():
  values = _parsed(train_config.TrainLMConfig)
  assert values['model.mlp_width'].help == (
    'hidden width of the SwiGLU; 0: the next multiple of 256 at or above 8/3 '
    'model_width.'
  )
  assert values['model.delta_net.conv_width'].help == (
    'taps of that convolution.'
  )
  assert values['optimizer.b1'].help == (
    'share of the mean gradient that is kept from step to step.'
  )


def test_flags_belong_to_the_program_that_defines_them():
  values = _parsed(train_config.DataConfig)
  names = {flag.name for flag in values.get_key_flags_for_module(__name__)}
  assert 'batch_size' in names


def test_a_prefix_names_a_part_of_the_config():
  values = _parsed(
    train_config.DataConfig, '--data.batch_size=3', prefix='data.'
  )
  changed = config_flags.override(
    train_config.DataConfig(), values, prefix='data.'
  )
  assert changed == train_config.DataConfig(batch_size=3)


def test_a_field_without_a_flag_type_is_refused():
  config_class = dataclasses.make_dataclass('C', [('field', dict[str, int])])
  with pytest.raises(TypeError, match='no flag type for field'):
    config_flags.define_flags(config_class, flag_values=flags.FlagValues())


def test_a_literal_becomes_an_enum():
  config_class = dataclasses.make_dataclass(
    'C', [('colour', Literal['red', 'blue'])]
  )
  with pytest.raises(flags.IllegalFlagValueError, match='<red|blue>'):
    _parsed(config_class, '--colour=green')
