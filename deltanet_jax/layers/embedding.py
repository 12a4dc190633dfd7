"""The look-up of token embeddings, on one device or on a mesh."""

import jax
import jax.numpy as jnp

from deltanet_jax import sharding

_NAME = 'embedding.embedding'


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns the rows of a table [vocab, D] for tokens [B, T], as [B, T, D].

  On an ambient mesh each device looks up the tokens it has in the part of the
  vocabulary it has, and the parts are summed over `tensor`. In the gradient
  what a device's tokens add to the table is summed over the others' alone.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return jnp.take(table, tokens, axis=0)
  return _sharded_lookup(table, tokens)


def _specs(shape, tokens):
  return (
    sharding.parameter_spec(_NAME, shape),
    sharding.activation_spec('tokens', tokens.shape),
  )


def _local(tokens, size, spec):
  """Returns the rows of this device's part, out of bounds where another's."""
  if spec[0] is None:
    return tokens
  local = tokens - jax.lax.axis_index(spec[0]) * size
  return jnp.where((local >= 0) & (local < size), local, size)


@jax.custom_vjp
def _sharded_lookup(table, tokens):
  spec, where = _specs(table.shape, tokens)

  def run(table, tokens):
    table = sharding.gather_share(table, spec)
    rows = _local(tokens, table.shape[0], spec)
    x = table.at[rows].get(mode='fill', fill_value=0)
    return x if spec[0] is None else jax.lax.psum(x, spec[0])

  return sharding.shard_map(run, (spec, where), jax.P(*where, None))(
    table, tokens
  )


def _lookup_fwd(table, tokens):
  return _sharded_lookup(table, tokens), (table, tokens)


def _lookup_bwd(residuals, dx):
  table, tokens = residuals
  spec, where = _specs(table.shape, tokens)
  parts = 1 if spec[0] is None else sharding.ambient_size(spec[0])

  def run(tokens, dx):
    size = table.shape[0] // parts
    rows = _local(tokens, size, spec)
    dtable = jnp.zeros((size, table.shape[1]), table.dtype)
    dtable = dtable.at[rows].add(dx.astype(table.dtype), mode='drop')
    return sharding.reduce_to_share(dtable, spec, where)

  run = sharding.shard_map(run, (where, jax.P(*where, None)), spec)
  return run(tokens, dx), None


_sharded_lookup.defvjp(_lookup_fwd, _lookup_bwd)
