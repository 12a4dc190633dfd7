"""Attention with bounded-memory control: Peng et al., arXiv 2110.02488.

Form as in https://github.com/fla-org/flash-linear-attention, fla/layers/abc.py
at commit 093741aa55ee9af691372cce86f0b574b8034bbb. The difference from it:
projections start as N(0, 0.02^2), as everywhere in this package.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax.layers import norm
from deltanet_jax.layers import options
from deltanet_jax.layers import recurrence
from deltanet_jax.layers import rotary
from deltanet_jax.layers import slot_attention

_NOTHING = -1e30  # Logarithm of no weight; finite, so that no NaN arises.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ABCConfig(options.RecurrenceConfig):
  """Options of the `abc` mixer.

  Attributes:
    num_slots: slots M of a head.
    key_expansion: key width of a head, in multiples of head_dim.
    rope_base: base of the rotary frequencies.
    clip: logits of the writing weights are clipped to [-clip, clip].
    chunk_size: as of `delta_net`.
    implementation: as of `delta_net`.
  """

  num_slots: int = 64
  key_expansion: float = 0.5
  rope_base: float = 10_000.0
  clip: float = 32.0

  def __post_init__(self):
    super().__post_init__()
    options.require_at_least(self, 1, 'num_slots')
    options.require_above(self, 0, 'key_expansion', 'rope_base', 'clip')


def cumulative_logsumexp(
  x: jax.Array, before: jax.Array, resets: jax.Array | None
) -> jax.Array:
  """Returns log of the sum of exp(x) since a document's start.

  Args:
    x: float32 [B, T, ...].
    before: [B, ...], the same sum over the tokens before.
    resets: bool [B, T], where a document starts; None: nowhere.
  """
  if resets is None:
    resets = jnp.zeros(x.shape[:2], bool)
  starts = jnp.zeros_like(resets[:, :1])
  resets = jnp.concatenate([starts, resets], axis=1)
  resets = jnp.broadcast_to(
    resets.reshape(*resets.shape, *(1,) * (x.ndim - 2)),
    (x.shape[0], x.shape[1] + 1, *x.shape[2:]),
  )

  def then(left, right):
    total = jnp.logaddexp(left[1], right[1])
    return left[0] | right[0], jnp.where(right[0], right[1], total)

  x = jnp.concatenate([before[:, None], x], axis=1)
  return jax.lax.associative_scan(then, (resets, x), axis=1)[1][:, 1:]


class ABC(recurrence.Recurrent):
  """Slots that hold averages, weighted by learned control vectors.

  With q, k, v the projections of x into H heads, values of width V = head_dim,
  rotated keys of width K = key_expansion V, and s = clip(x W_s) [B, T, H, M],

      z_t = log sum_{i <= t} exp(s_i)
      phi_t = exp(s_t - z_t)        alpha_t = exp(z_{t-1} - z_t)
      o = the slot attention of q, k, v, phi, alpha, with scale 1 / sqrt(K)
      y = (RMSNorm(o) SiLU(x W_gate)) W_o

  so that a slot holds sum exp(s_i) k_i / sum exp(s_i); see `slot_attention`.
  State: H M (K + V) numbers, and H M for z.
  """

  config_class = ABCConfig

  def _build(self, rngs: nnx.Rngs) -> None:
    factor = self.config.key_expansion
    self.key_dim = options.expand(self.head_dim, factor, 'key_expansion')
    rotary.frequencies(self.key_dim, self.config.rope_base)
    keys = self.num_heads * self.key_dim
    values = self.num_heads * self.head_dim
    self.q_proj = self._linear(keys, rngs)
    self.k_proj = self._linear(keys, rngs)
    self.v_proj = self._linear(values, rngs)
    self.s_proj = self._linear(self.num_heads * self.config.num_slots, rngs)
    self.gate_proj = self._linear(values, rngs)
    self.o_proj = self._linear(self.model_width, rngs, values)
    self.positions = rotary.Positions()
    self.head_norm = norm.RMSNorm(self.head_dim, eps=self.norm_eps)

  def empty_state(
    self, batch: int
  ) -> tuple[slot_attention.SlotState, jax.Array]:
    """Returns empty slots and z [B, H, M] of no weight."""
    heads, slots = self.num_heads, self.config.num_slots
    state = slot_attention.empty_slots(
      batch, heads, slots, self.key_dim, self.head_dim
    )
    return state, jnp.full((batch, heads, slots), _NOTHING, jnp.float32)

  def _mix(self, x: jax.Array, past: recurrence.Past) -> jax.Array:
    q, k, v, s = (
      self._split_heads(project(x))
      for project in (self.q_proj, self.k_proj, self.v_proj, self.s_proj)
    )
    positions = past.local('positions', x)
    frequencies = rotary.frequencies(self.key_dim, self.config.rope_base)
    q, k = (rotary.rotate(y, positions, frequencies) for y in (q, k))
    s = jnp.clip(s.astype(jnp.float32), -self.config.clip, self.config.clip)
    if past.tokens is not None:
      s = jnp.where(past.tokens[..., None, None], s, _NOTHING)
    past.state, before = past.state
    z = cumulative_logsumexp(s, before, past.resets)
    previous = jnp.concatenate([before[:, None], z[:, :-1]], axis=1)
    # Where nothing was written before, what decays is empty.
    g = jnp.where(previous > _NOTHING / 2, jnp.minimum(previous - z, 0), 0)
    o = slot_attention.attend(past, q, k, v, jnp.exp(s - z), g, scale=None)
    past.state = (past.state, z[:, -1])
    o = self.head_norm(o).reshape(*x.shape[:2], -1)  # [B, T, H V]
    return self.o_proj(o * jax.nn.silu(self.gate_proj(x)))
