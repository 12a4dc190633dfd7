"""One typed absl flag per field of a (nested) config dataclass.

`define_flags(TrainLMConfig)` defines `--model.num_layers`, `--data.files` and
so on, all unset; `override(config, flags.FLAGS)` applies those that were given.
"""

import dataclasses
import inspect
import re
import typing
from typing import Any, Literal

from absl import flags

# The flags belong to the program that defines them, so `--help` shows them.
flags.disclaim_key_flags()


def _descriptions(config_class: type) -> dict[str, str]:
  """Returns field name -> text of the docstring's Attributes section."""
  _, _, section = (inspect.getdoc(config_class) or '').partition('Attributes:')
  descriptions: dict[str, str] = {}
  name = None
  for line in section.splitlines():
    entry = re.fullmatch(r'  (\w+): (.+)', line)
    if entry:
      name = entry[1]
      descriptions[name] = entry[2]
    elif name and line.startswith('    '):
      descriptions[name] += ' ' + line.strip()
    elif line.strip():
      break
  return descriptions


def _define(
  name: str, annotation: Any, description: str, flag_values: flags.FlagValues
) -> None:
  """Defines one unset flag of the annotated type."""
  scalars = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  if annotation in scalars:
    scalars[annotation](name, None, description, flag_values=flag_values)
  elif typing.get_origin(annotation) is Literal:
    choices = list(typing.get_args(annotation))
    flags.DEFINE_enum(name, None, choices, description, flag_values=flag_values)
  elif annotation == tuple[str, ...]:
    flags.DEFINE_list(name, None, description, flag_values=flag_values)
  else:
    raise TypeError(
      f'no flag type for {name}: {annotation}; use int, float, bool, str, a '
      'Literal of strings, tuple[str, ...] or a dataclass of them'
    )


def define_flags(
  config_class: type,
  *,
  prefix: str = '',
  flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
  """Defines the flags of `config_class`, each with None as its default.

  Args:
    config_class: a dataclass whose fields are int, float, bool, str, a Literal
      of strings (an enum flag), tuple[str, ...] (a comma-separated list flag)
      or such dataclasses again (whose flags are named `field.subfield`).
    prefix: what every flag name starts with, such as 'data.'.
    flag_values: where the flags are defined.

  Raises:
    TypeError: a field has another type.
  """
  annotations = typing.get_type_hints(config_class)
  descriptions = _descriptions(config_class)
  for field in dataclasses.fields(config_class):
    name = f'{prefix}{field.name}'
    annotation = annotations[field.name]
    if dataclasses.is_dataclass(annotation):
      define_flags(annotation, prefix=f'{name}.', flag_values=flag_values)
    else:
      description = descriptions.get(
        field.name, f'See {config_class.__name__}.'
      )
      _define(name, annotation, description, flag_values)


def _given(
  config: Any, prefix: str, flag_values: flags.FlagValues
) -> dict[str, Any]:
  """Returns flag name -> value of the flags of `config` that were given."""
  given: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    name, value = f'{prefix}{field.name}', getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      given |= _given(value, f'{name}.', flag_values)
    elif name in flag_values and flag_values[name].value is not None:
      new = flag_values[name].value
      given[name] = tuple(new) if isinstance(new, list) else new
  return given


def _replace[Config](
  config: Config, prefix: str, given: dict[str, Any]
) -> Config:
  """Returns `config` with the given values, every level validated once."""
  changes = {}
  for field in dataclasses.fields(config):
    name, value = f'{prefix}{field.name}', getattr(config, field.name)
    if name in given:
      changes[field.name] = given[name]
    elif any(flag.startswith(f'{name}.') for flag in given):
      changes[field.name] = _replace(value, f'{name}.', given)
  return dataclasses.replace(config, **changes)


def override[Config](
  config: Config,
  flag_values: flags.FlagValues = flags.FLAGS,
  *,
  prefix: str = '',
) -> Config:
  """Returns `config` with the flags that were given put in.

  Args:
    config: an instance of the class that `define_flags` got.
    flag_values: where the flags were defined; parsed.
    prefix: the `prefix` that `define_flags` got.

  Raises:
    ValueError: the result breaks a rule of the config; one line that names the
      rule and the flags given.
  """
  given = _given(config, prefix, flag_values)
  if not given:
    return config
  try:
    return _replace(config, prefix, given)
  except ValueError as error:
    command = ' '.join(flag_values[name].serialize() for name in given)
    raise ValueError(f'{error} (flags given: {command})') from error
