"""What the benchmarks call: an op, a variant of it and sizes."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.delta_rule import api as delta_rule_api
from pallas_kernels.delta_rule import arg_specs as delta_specs
from pallas_kernels.delta_rule import product_api
from pallas_kernels.diagonal_plus_low_rank import api as low_rank_api
from pallas_kernels.diagonal_plus_low_rank import arg_specs as low_rank_specs
from pallas_kernels.linear_attention import api as linear_api
from pallas_kernels.linear_attention import arg_specs as linear_specs

OPS: Mapping[str, dispatch.Op] = {
  op.name: op
  for op in (
    delta_rule_api.DELTA_RULE,
    product_api.DELTA_PRODUCT,
    low_rank_api.DIAGONAL_PLUS_LOW_RANK,
    linear_api.LINEAR_ATTENTION,
  )
}
GATES = ('none', 'head', 'channel')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One call of an op; axes as in `pallas_kernels`.

  Attributes:
    op: public name in `pallas_kernels`.
    gate: axes of the log-decay g: `none`, `head` [B, T, H] or `channel`
      [B, T, H, K]. diagonal_plus_low_rank's is always per channel.
    normalize_qk: the delta rule divides q and k by their norms.
    keys_per_token: n of delta_product; 1 for the others.
    name: name of the sizes, in rows of results.
    B: batch; 0 where the setting leaves no whole row, see `problem`.
    T: time.
    H: heads of queries and keys; 0 as for B.
    HV: heads of values, a multiple of H; 0: as many as H.
    K: key dimension.
    V: value dimension.
    dtype: of all arguments but g, which is float32.
  """

  op: str
  gate: str = 'none'
  normalize_qk: bool = False
  keys_per_token: int = 1
  name: str
  B: int
  T: int
  H: int
  HV: int = 0
  K: int
  V: int
  dtype: str = 'float32'

  def __post_init__(self):
    for field, known in (('op', tuple(OPS)), ('gate', GATES)):
      if getattr(self, field) not in known:
        raise ValueError(
          f'{field} of {self.name} must be one of {known}, got '
          f'{getattr(self, field)!r}'
        )
    if self.normalize_qk and self.op != 'delta_rule':
      raise ValueError(f'normalize_qk of {self.op} is not timed')
    if self.keys_per_token > 1 and self.op != 'delta_product':
      raise ValueError(
        f'keys_per_token of {self.op} must be 1, got {self.keys_per_token}'
      )
    if self.HV and (not self.H or self.HV % self.H):
      raise ValueError(
        f'HV of {self.name} must be a multiple of H, got HV={self.HV} and '
        f'H={self.H}'
      )

  @property
  def value_heads(self) -> int:
    """Heads of values, with the default filled in."""
    return self.HV or self.H

  @property
  def variant(self) -> str:
    """What distinguishes the case from others of its op."""
    if self.op == 'delta_product':
      return f'n={self.keys_per_token}'
    gate = 'plain' if self.gate == 'none' else f'g per {self.gate}'
    return f'{gate}, l2' if self.normalize_qk else gate

  @property
  def problem(self) -> str | None:
    """Why the sizes cannot be run, or None."""
    if not self.B:
      return f'the tokens in all make no row of T={self.T}'
    return None if self.H else f'the width makes no head of K={self.K}'

  @property
  def function(self) -> Callable[..., Any]:
    """The op."""
    return getattr(pallas_kernels, self.op)

  @property
  def options(self) -> dict[str, bool]:
    """What the op is called with beside arrays."""
    return {'normalize_qk': True} if self.normalize_qk else {}

  @property
  def shape(self) -> dict[str, str | int]:
    """The sizes as rows of results name them."""
    sizes = {axis: getattr(self, axis) for axis in 'B T H K V'.split()}
    return {
      'name': self.name,
      'dtype': self.dtype,
      'HV': self.value_heads,
    } | sizes

  def arguments(self) -> dict[str, jax.Array]:
    """Returns random arguments: keys of norm 1, beta in (0, 1), g < 0."""
    if self.op == 'diagonal_plus_low_rank':
      spec = low_rank_specs.ArgSpec(**self.shape)
      return low_rank_specs.random_arguments(spec)
    linear = linear_specs.ArgSpec(gate=self.gate, **self.shape).arguments()
    if self.op == 'linear_attention':
      return _draw(linear)
    n = self.keys_per_token
    spec = delta_specs.ArgSpec(**self.shape | {'T': n * self.T})
    arrays = _draw(spec.arguments() | _gate(linear))
    if self.op == 'delta_product':
      arrays = {
        name: x.reshape(self.B, self.T, n, *x.shape[2:])
        for name, x in arrays.items()
      }
      arrays['q'] = arrays['q'][:, :, 0]
    return arrays


def _gate(given: Mapping[str, Any]) -> dict[str, Any]:
  return {name: x for name, x in given.items() if name == 'g'}


def _draw(given: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Returns arrays drawn on the device: a host is slow at billions of them."""
  arrays = {}
  for i, (name, x) in enumerate(given.items()):
    array = jax.random.normal(jax.random.key(i), x.shape, jnp.float32)
    if name == 'k':
      array /= jnp.linalg.norm(array, axis=-1, keepdims=True)
    elif name == 'beta':
      array = jax.nn.sigmoid(array)
    elif name == 'g':
      array = -jnp.exp(array - 2)
    arrays[name] = array.astype(x.dtype)
  return arrays
