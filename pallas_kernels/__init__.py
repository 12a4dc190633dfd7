"""Functional recurrences with hand-written kernels.

Every op has one definition (`recurrent`, a scan over tokens) and several
implementations of it, picked by `implementation=`; see
`pallas_kernels.dispatch` for how the choice is made.
"""

from pallas_kernels.delta_rule.api import delta_rule
from pallas_kernels.delta_rule.api import delta_rule_step

__all__ = ['delta_rule', 'delta_rule_step']
