"""Slot attention token by token, in numpy (table 4 of arXiv 2406.06484)."""

import numpy as np


def attend(q, k, v, write, alpha, *, scale):
  """Returns o [T, H, V] for q, k [T, H, K], v [T, H, V], write [T, H, M]."""
  length, heads, slots = write.shape
  o = np.zeros_like(v)
  for h in range(heads):
    keys = np.zeros((slots, k.shape[-1]))
    values = np.zeros((slots, v.shape[-1]))
    for t in range(length):
      keep = alpha[t, h][:, None]
      keys = keep * keys + np.outer(write[t, h], k[t, h])
      values = keep * values + np.outer(write[t, h], v[t, h])
      logits = scale * keys @ q[t, h]
      weights = np.exp(logits - logits.max())
      o[t, h] = weights / weights.sum() @ values
  return o
