"""Float64 transcriptions of layers: the parts that many of them share.

A layer's test writes its published equations once more, in numpy over one row
and token by token, and compares; nothing of the layer's own code is used.
"""

from flax import nnx
import jax
import numpy as np

WIDTH, HEADS, EPS = 12, 2, 0.05
X = np.random.default_rng(0).normal(size=(2, 7, WIDTH)).astype(np.float32)


def build(layer_class, options=None, *, num_heads=HEADS, head_dim=0):
  """Returns a layer of visible parameters, and these in float64."""
  layer = layer_class(
    WIDTH,
    num_heads,
    head_dim=head_dim,
    config=layer_class.config_class(**(options or {})),
    norm_eps=EPS,
    rngs=nnx.Rngs(0),
  )
  random = np.random.default_rng(1)

  def perturbed(leaf):
    noise = 0.5 * random.normal(size=leaf.shape)
    return leaf + noise.astype('float32')

  params = jax.tree.map(perturbed, nnx.to_pure_dict(nnx.state(layer)))
  nnx.update(layer, params)
  return layer, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def assert_equals(layer_class, expected, options=None, *, tolerance=1e-4, **kw):
  """Compares a layer with `expected(params, x [T, D], layer) -> [T, D]`."""
  layer, params = build(layer_class, options, **kw)
  graph, state = nnx.split(layer)
  y = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0])(state, X)
  rows = [expected(params, x.astype(np.float64), layer) for x in X]
  scale = np.max(np.abs(rows))
  np.testing.assert_allclose(y / scale, np.stack(rows) / scale, atol=tolerance)
  assert scale > 1e-3


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def softplus(x):
  return np.log1p(np.exp(x))


def conv(params, x):
  """Causal depthwise convolution of x [T, D], with a bias if it has one."""
  kernel = params['kernel']
  padded = np.concatenate([np.zeros((len(kernel) - 1, x.shape[1])), x])
  y = sum(kernel[j] * padded[j : j + len(x)] for j in range(len(kernel)))
  return y + params.get('bias', 0)


def linear(params, x):
  return x @ params['kernel'] + params.get('bias', 0)


def shift(x):
  """The token before, 0 at first."""
  return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def heads(x, num_heads=HEADS):
  return x.reshape(len(x), num_heads, -1)


def l2(x):
  return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def rms_norm(params, x, eps=EPS):
  return params['scale'] * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def head_norm(params, x, eps):
  centred = x - x.mean(-1, keepdims=True)
  y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
  return params['scale'] * y + params['bias']


def recurrence(update, q, shape):
  """Returns o[t, h] = S^T q with S = update(S, t, h), S of `shape` at first."""
  length, num_heads = q.shape[:2]
  o = np.zeros((length, num_heads, shape[1]))
  for h in range(num_heads):
    state = np.zeros(shape)
    for t in range(length):
      state = update(state, t, h)
      o[t, h] = state.T @ q[t, h]
  return o
