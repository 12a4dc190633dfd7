"""The DeltaNet token mixer."""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from deltanet_jax import config as config_lib
from deltanet_jax.layers import feature_maps
from deltanet_jax.layers import linear
from deltanet_jax.layers import norm
from deltanet_jax.layers import segments
from deltanet_jax.layers import short_conv
from pallas_kernels import delta_rule
from pallas_kernels import delta_rule_step


class DeltaNetCache(NamedTuple):
  """What a row remembers: constant in size, whatever its length.

  Attributes:
    state: float32 [B, H, K, V].
    segment_id: int32 [B], the last document; 0 before the first token.
    q_conv: past of the convolution of q; None without convolutions.
    k_conv: the same of k.
    v_conv: the same of v.
  """

  state: jax.Array
  segment_id: jax.Array
  q_conv: short_conv.ShortConvCache | None
  k_conv: short_conv.ShortConvCache | None
  v_conv: short_conv.ShortConvCache | None


class DeltaNet(nnx.Module):
  """The delta-rule layer of Yang et al., arXiv 2406.06484, section 3.4.

  With x [B, T, D], H heads of width K = V = head_dim, phi the feature map,

      q = normalize(phi(conv(x W_q)))      k likewise
      v = SiLU(conv(x W_v))
      beta = sigmoid(x W_beta)             twice that with negative eigenvalues
      y = RMSNorm(delta_rule(q, k, v, beta)) W_o

  where q, k, v are cut into heads before their normalisation, the scale of the
  delta rule is 1, and the RMSNorm acts on a head, its scale [V] shared by the
  heads. An output gate multiplies what enters W_o by SiLU(x W_gate).

  The layer needs no positions, and documents packed into a row do not see each
  other when `segment_ids` tells them apart.
  """

  def __init__(
    self,
    model_width: int,
    num_heads: int,
    *,
    head_dim: int = 0,
    config: config_lib.DeltaNetConfig | None = None,
    norm_eps: float = 1e-6,
    dtype: config_lib.DType = 'float32',
    rngs: nnx.Rngs,
  ):
    """Builds the layer.

    Args:
      model_width: width D of the input and the output.
      num_heads: heads H.
      head_dim: key and value width of a head; 0: model_width / num_heads.
      config: options; None: the paper's.
      norm_eps: epsilon of the RMSNorm of the heads.
      dtype: dtype of the activations; parameters are float32.
      rngs: source of the initial parameters.

    Raises:
      ValueError: head_dim=0 and the heads do not divide the width.
    """
    if not head_dim and model_width % num_heads:
      raise ValueError(
        'with head_dim=0, model_width must be a multiple of num_heads, got '
        f'{model_width} and {num_heads}; otherwise set head_dim'
      )
    self.config = config or config_lib.DeltaNetConfig()
    self.num_heads = num_heads
    self.head_dim = head_dim or model_width // num_heads
    self.dtype = dtype
    width = num_heads * self.head_dim

    def project(in_features, out_features):
      return linear.linear(in_features, out_features, dtype=dtype, rngs=rngs)

    def conv():
      return short_conv.ShortConv(
        width, width=self.config.conv_width, dtype=dtype, rngs=rngs
      )

    self.q_proj = project(model_width, width)
    self.k_proj = project(model_width, width)
    self.v_proj = project(model_width, width)
    self.beta_proj = project(model_width, num_heads)
    self.o_proj = project(width, model_width)
    if self.config.use_short_conv:
      self.q_conv, self.k_conv, self.v_conv = conv(), conv(), conv()
    if self.config.use_output_gate:
      self.gate_proj = project(model_width, width)
    self.head_norm = norm.RMSNorm(self.head_dim, eps=norm_eps)

  @classmethod
  def from_model_config(
    cls, config: config_lib.ModelConfig, *, rngs: nnx.Rngs
  ) -> 'DeltaNet':
    """Builds the layer as a block of a language model has it."""
    return cls(
      config.model_width,
      config.num_heads,
      head_dim=config.resolved_head_dim,
      config=config.delta_net,
      norm_eps=config.norm_eps,
      dtype=config.dtype,
      rngs=rngs,
    )

  def init_cache(self, batch: int) -> DeltaNetCache:
    """Returns the cache of `batch` rows that have seen no token."""
    convs = (None,) * 3
    if self.config.use_short_conv:
      convs = (self.q_conv, self.k_conv, self.v_conv)
      convs = tuple(conv.init_cache(batch) for conv in convs)
    shape = (batch, self.num_heads, self.head_dim, self.head_dim)
    return DeltaNetCache(
      jnp.zeros(shape, jnp.float32), jnp.zeros((batch,), jnp.int32), *convs
    )

  def __call__(
    self,
    x: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    cache: DeltaNetCache | None = None,
  ) -> tuple[jax.Array, DeltaNetCache | None]:
    """Mixes the tokens of every row.

    Args:
      x: [B, T, D].
      segment_ids: int32 [B, T]: the document of every token, 0 is padding;
        None: the row's last document goes on.
      cache: what the rows remember; None: they start here.

    Returns:
      y [B, T, D] in the layer's dtype, 0 at padding, and the new cache (None
      without one).
    """
    if segment_ids is not None:
      segment_ids = segment_ids.astype(jnp.int32)
    ids = segment_ids
    if cache is not None and ids is None:
      ids = segments.continued_ids(cache.segment_id, x.shape[1])
    q, k, v, convs = self._queries_keys_values(x, ids, cache)
    beta = jax.nn.sigmoid(self.beta_proj(x).astype(jnp.float32))  # [B, T, H]
    if self.config.allow_negative_eigenvalues:
      beta = 2 * beta
    if cache is None:
      o, _ = self._delta_rule(q, k, v, beta, None, segment_ids)
    else:
      o, state = self._recur(q, k, v, beta, cache, ids, segment_ids is None)
      last = segments.last_id(ids, cache.segment_id)
      cache = DeltaNetCache(state, last, *convs)
    o = self.head_norm(o).reshape(*x.shape[:2], -1)  # [B, T, H V]
    if self.config.use_output_gate:
      o = o * jax.nn.silu(self.gate_proj(x))
    return self.o_proj(o), cache

  def _queries_keys_values(self, x, ids, cache):
    """Returns q, k, v [B, T, H, K] and the caches of their convolutions."""
    q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, T, H K]
    convs = (None,) * 3
    if self.config.use_short_conv:
      past = convs if cache is None else cache[2:]
      q, q_past = self.q_conv(q, segment_ids=ids, cache=past[0])
      k, k_past = self.k_conv(k, segment_ids=ids, cache=past[1])
      v, v_past = self.v_conv(v, segment_ids=ids, cache=past[2])
      convs = (q_past, k_past, v_past)

    def heads(y):
      return y.reshape(*y.shape[:2], self.num_heads, self.head_dim)

    def features(y):
      y = feature_maps.apply_feature_map(self.config.feature_map, heads(y))
      return norm.normalize(self.config.qk_norm, y)

    return features(q), features(k), heads(jax.nn.silu(v)), convs

  def _delta_rule(self, q, k, v, beta, state, segment_ids):
    return delta_rule(
      q,
      k,
      v,
      beta,
      scale=1.0,
      initial_state=state,
      segment_ids=segment_ids,
      chunk_size=self.config.chunk_size or None,
      implementation=self.config.implementation or None,
    )

  def _recur(self, q, k, v, beta, cache, ids, same_document):
    """Runs the recurrence from the cached state; returns o and the new one."""
    first = segments.first_id(ids)
    goes_on = (first == 0) | (first == cache.segment_id)
    state = jnp.where(goes_on[:, None, None, None], cache.state, 0)
    if q.shape[1] > 1:
      ids = None if same_document else ids
      return self._delta_rule(q, k, v, beta, state, ids)
    token = ids != 0  # [B, 1]
    o, state = delta_rule_step(
      q[:, 0],
      k[:, 0],
      v[:, 0],
      jnp.where(token[..., None], beta, 0)[:, 0],  # 0 writes nothing
      state=state,
      scale=1.0,
    )
    return jnp.where(token[..., None], o, 0)[:, None], state
