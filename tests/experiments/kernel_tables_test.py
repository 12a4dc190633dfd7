from experiments import kernel_tables

KERNEL = {
  'kind': 'kernel_resources',
  'head_dim': 128,
  'gate': 'none',
  'normalize_qk': False,
  'columns': 64,
  'pass': 'forward',
  'kernel': 'wide',
  'registers': 168,
  'spill_bytes': 0,
  'local_accesses': 0,
  'shared_bytes': 181_248,
  'hgmma': 40,
  'warnings': ['one'],
  'bytes_per_token': 1316.0,
  'flops_per_token': 262_144.0,
  'broken': ['warnings must be none, got [one]'],
}
STEP = {
  'kind': 'train_step_memory',
  'preset': 'p',
  'batch': 4,
  'length': 8,
  'temp_bytes': 2_500_000_000,
  'argument_bytes': 16_000_000_000,
  'broken': [],
}


def test_a_kernel_fills_every_column():
  line = kernel_tables.format_row(KERNEL)
  assert len(line) == len(kernel_tables.header())
  assert line.split() == (
    '128 none False 64 forward wide 168 0 0 181248 40 1 1,316 262,144'.split()
  )


def test_what_is_not_counted_is_a_dash():
  line = kernel_tables.format_row(KERNEL | {'flops_per_token': None})
  assert line.split()[-2:] == ['1,316', '-']


def test_a_step_is_a_sentence():
  assert kernel_tables.format_row(STEP) == (
    'training step of p, 4 x 8 tokens: 2.5 GB of temporary memory beside '
    '16.0 GB of state'
  )


def test_totals_are_of_the_plain_rule_at_128():
  sizes = {
    'inverse': 1.0,
    'recurrence': 10.0,
    'recurrence_saving': 100.0,
    'states': 1000.0,
    'recurrence_bwd': 10_000.0,
    'chunk_bwd': 100_000.0,
  }
  rows = [
    KERNEL | {'kernel': f'delta_rule_{name}', 'bytes_per_token': size}
    for name, size in sizes.items()
  ]
  others = [
    row | {name: value, 'bytes_per_token': 9e9}
    for row in rows
    for name, value in (('gate', 'head'), ('normalize_qk', True))
  ]
  forward, backward = kernel_tables.totals([*rows, *others, STEP])
  assert forward.startswith('forward, K = V = 128, no decay: 101 bytes')
  assert 'head, 11 with no states kept; 1,026 are compulsory' in forward
  assert 'no decay: 110,000 bytes per token and head, 111,000 with' in backward
  assert backward.endswith('flash-linear-attention takes 12,038')


def test_there_are_no_totals_of_some_kernels():
  assert not list(kernel_tables.totals([KERNEL, STEP]))


def test_broken_gates_say_where():
  assert list(kernel_tables.broken([KERNEL, STEP])) == [
    'BROKEN: wide, 128, none, False, 64: warnings must be none, got [one]'
  ]
