"""What the options of layers may be, and the checks of their rules."""

import dataclasses
import typing
from typing import Any, Literal

FeatureMap = Literal['silu', 'relu', 'elu_plus_one', 'identity']
QKNorm = Literal['l2', 'l1']
DType = Literal['bfloat16', 'float32']


def require_at_least(config: Any, minimum: int, *names: str) -> None:
  """Raises ValueError unless the fields so named are at least `minimum`."""
  for name in names:
    value = getattr(config, name)
    if value < minimum:
      raise ValueError(f'{name} must be at least {minimum}, got {value}')


def require_above(config: Any, bound: float, *names: str) -> None:
  """Raises ValueError unless the fields so named are above `bound`."""
  for name in names:
    value = getattr(config, name)
    if not value > bound:
      raise ValueError(f'{name} must be above {bound}, got {value}')


def require_choice(config: Any, name: str, choices: Any) -> None:
  """Raises ValueError unless the field is one of a Literal's strings."""
  value, known = getattr(config, name), typing.get_args(choices)
  if value not in known:
    raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}')


def resolve_head_dim(model_width: int, num_heads: int, head_dim: int) -> int:
  """Returns head_dim, or where it is 0 the width divided by the heads.

  Raises:
    ValueError: it is 0 and the heads do not divide the width.
  """
  if not head_dim and model_width % num_heads:
    raise ValueError(
      'with head_dim=0, model_width must be a multiple of num_heads, got '
      f'model_width={model_width} and num_heads={num_heads}; otherwise set '
      'head_dim'
    )
  return head_dim or model_width // num_heads


def expand(head_dim: int, factor: float, name: str) -> int:
  """Returns head_dim * factor.

  Raises:
    ValueError: that is no whole number above 0; names the option.
  """
  width = round(head_dim * factor)
  if width != head_dim * factor or width < 1:
    raise ValueError(
      f'head_dim * {name} must be a whole number above 0, got '
      f'head_dim={head_dim} and {name}={factor}'
    )
  return width


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrenceConfig:
  """How a layer's recurrence is computed; every recurrent mixer has these.

  Attributes:
    chunk_size: chunk of the chunkwise form; 0: the implementation's choice.
    implementation: see the op in `pallas_kernels`; empty: automatic.
  """

  chunk_size: int = 0
  implementation: str = ''

  def __post_init__(self):
    require_at_least(self, 0, 'chunk_size')
