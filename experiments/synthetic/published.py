"""Published accuracies, as parts of 1, that results are drawn beside.

MQAR, RegBench and MAD: Yang et al., arXiv 2406.06484; the first two are read
off its authors' figures, to 0.01 and 0.003. Parity and modular arithmetic:
Grazzi et al., arXiv 2411.12537, scaled accuracies of its figures.
"""

MQAR_WIDTHS = (64, 128, 256, 512)
# At 512 tokens and 64 pairs.
MQAR: dict[str, tuple[float, ...]] = {
  'delta_net': (1.0, 1.0, 1.0, 1.0),
  'mamba': (0.81, 1.0, 1.0, 1.0),
  'gla': (0.22, 0.95, 1.0, 1.0),
  'retnet': (0.05, 0.87, 0.96, 0.97),
  'rwkv4': (0.0, 0.0, 0.20, 0.35),
  'hyena': (0.0, 0.0, 0.12, 0.20),
}

MAD_TASKS = (
  'compression',
  'fuzzy_recall',
  'in_context_recall',
  'memorization',
  'noisy_recall',
  'selective_copying',
)
MAD: dict[str, tuple[float, ...]] = {
  'attention': (0.516, 0.298, 0.941, 0.852, 0.868, 0.996),
  'hyena': (0.452, 0.079, 0.817, 0.895, 0.788, 0.931),
  'multihead_hyena': (0.448, 0.144, 0.990, 0.894, 0.986, 0.930),
  'mamba': (0.527, 0.067, 0.904, 0.895, 0.901, 0.863),
  'gla': (0.388, 0.069, 0.808, 0.633, 0.816, 0.886),
  'delta_net': (0.422, 0.357, 1.0, 0.528, 1.0, 1.0),
}

REGBENCH_SIZES = (2_500, 5_000, 10_000, 20_000)
REGBENCH: dict[str, tuple[float, ...]] = {
  'attention': (0.927, 0.940, 0.950, 0.955),
  'delta_net': (0.813, 0.873, 0.888, 0.930),
  'delta_net, no convolution': (0.790, 0.852, 0.852, 0.929),
  'gla': (0.603, 0.854, 0.898, 0.929),
  'gla, no convolution': (0.525, 0.814, 0.897, 0.929),
  'mamba': (0.843, 0.891, 0.909, 0.920),
  'mamba, no convolution': (0.520, 0.525, 0.572, 0.574),
}

LENGTHS = (40, 60, 100, 150, 200, 255)
# Scaled: (accuracy - 1/2) / (1 - 1/2).
PARITY: dict[str, tuple[float, ...]] = {
  'delta_net, beta in (0, 1)': (0.86, 0.0, 0.03, -0.35, -0.26, -0.09),
  'delta_net, beta in (0, 2)': (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
}

# Scaled: (accuracy - 1/5) / (1 - 1/5).
MODULAR: dict[str, tuple[float, ...]] = {
  'delta_net, beta in (0, 1)': (0.96, 0.75, 0.05, 0.12, 0.01, -0.06),
  'delta_net, beta in (0, 2)': (1.0, 0.98, 0.91, 0.65, 0.24, 0.16),
}
MODULAR_BRACKETS: dict[str, tuple[float, ...]] = {
  'delta_net, beta in (0, 1)': (1.0, 0.73, 0.10, 0.20, -0.01, 0.14),
  'delta_net, beta in (0, 2)': (1.0, 1.0, 0.65, 0.06, -0.18, 0.05),
}
# Title of the task's panel -> (accuracy of chance, scaled accuracies).
STATE_TRACKING = {
  'parity': (1 / 2, PARITY),
  'modular arithmetic': (1 / 5, MODULAR),
  'modular arithmetic, brackets': (1 / 5, MODULAR_BRACKETS),
}
