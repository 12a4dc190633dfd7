"""Elementwise maps of queries and keys."""

from collections.abc import Callable

import jax

from deltanet_jax.layers import options


def _identity(x: jax.Array) -> jax.Array:
  return x


def _elu_plus_one(x: jax.Array) -> jax.Array:
  return jax.nn.elu(x) + 1


_FEATURE_MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
  'elu_plus_one': _elu_plus_one,
  'identity': _identity,
}


def apply_feature_map(name: options.FeatureMap, x: jax.Array) -> jax.Array:
  """Applies a feature map by its name, in the dtype of x.

  `silu` is x sigmoid(x), `relu` max(x, 0), `elu_plus_one` x + 1 above 0 and
  exp(x) below, `identity` x.

  Raises:
    ValueError: the name is unknown.
  """
  if name not in _FEATURE_MAPS:
    raise ValueError(
      f'feature_map must be one of {", ".join(_FEATURE_MAPS)}, got {name!r}'
    )
  return _FEATURE_MAPS[name](x)
