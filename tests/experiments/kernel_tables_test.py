from experiments import kernel_tables

KERNEL = {
  'kind': 'kernel_resources',
  'head_dim': 128,
  'gate': 'none',
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
    '128 none forward wide 168 0 0 181248 40 1 1,316 262,144'.split()
  )


def test_a_step_is_a_sentence():
  assert kernel_tables.format_row(STEP) == (
    'training step of p, 4 x 8 tokens: 2.5 GB of temporary memory beside '
    '16.0 GB of state'
  )


def test_totals_are_of_the_plain_rule_at_128():
  other = KERNEL | {'gate': 'head', 'bytes_per_token': 9e9}
  (line,) = kernel_tables.totals([KERNEL, KERNEL, other, STEP])
  assert line.startswith('forward, K = V = 128, no decay: 2,632 bytes')
  assert '1,026 are compulsory, flash-linear-attention takes 5,124' in line


def test_broken_gates_say_where():
  assert list(kernel_tables.broken([KERNEL, STEP])) == [
    'BROKEN: wide, forward, 128, none: warnings must be none, got [one]'
  ]
