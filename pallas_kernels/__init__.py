"""Functional recurrences with hand-written kernels.

Every op has one definition (`recurrent`, a scan over tokens) and several
implementations of it, picked by `implementation=`; see
`pallas_kernels.dispatch` for how the choice is made.
"""

from pallas_kernels import normalization
from pallas_kernels import sequence_parallel
from pallas_kernels import sharded_call
from pallas_kernels.delta_rule.api import delta_rule
from pallas_kernels.delta_rule.api import delta_rule_step
from pallas_kernels.delta_rule.product_api import delta_product
from pallas_kernels.delta_rule.product_api import delta_product_step
from pallas_kernels.diagonal_plus_low_rank.api import diagonal_plus_low_rank
from pallas_kernels.diagonal_plus_low_rank.api import (
  diagonal_plus_low_rank_step,
)
from pallas_kernels.linear_attention.api import linear_attention
from pallas_kernels.linear_attention.api import linear_attention_step
from pallas_kernels.linear_attention.api import linear_attention_with_normalizer
from pallas_kernels.linear_attention.stabilizer import stabilized_gates

__all__ = [
  'delta_product',
  'delta_product_step',
  'delta_rule',
  'delta_rule_step',
  'diagonal_plus_low_rank',
  'diagonal_plus_low_rank_step',
  'linear_attention',
  'linear_attention_step',
  'linear_attention_with_normalizer',
  'normalization',
  'sequence_parallel',
  'sharded_call',
  'stabilized_gates',
]
