"""Times of others' kernels, as published, beside which ours are shown."""

from experiments import benchmark_cases

FLASH_QLA_SOURCE = 'FlashQLA, its published table for one NVIDIA H200'

# Milliseconds of the gated delta rule in bfloat16, K = V = 128, by
# (B, T, H, HV) and pass.
FLASH_QLA_MS = {
  ((1, 8192, 32, 32), 'forward'): 0.283,
  ((1, 32768, 32, 32), 'forward'): 0.887,
  ((1, 8192, 16, 32), 'backward'): 0.789,
}
_DIMS = (128, 128, 'bfloat16')


def milliseconds(case: benchmark_cases.Case, pass_name: str) -> float | None:
  """Returns what was published for a call, or None."""
  is_gated = (case.op, case.gate) == ('delta_rule', 'head')
  if not is_gated or case.normalize_qk or (case.K, case.V, case.dtype) != _DIMS:
    return None
  sizes = (case.B, case.T, case.H, case.value_heads)
  return FLASH_QLA_MS.get((sizes, pass_name))
