import json

from experiments import compile_suite
from experiments import compile_tables

GIB = 2**30
ROW = {
  'kind': 'compile_report',
  'model': '1b',
  'target': 'v5p:4x4x4',
  'num_chips': 64,
  'batch_size': 512,
  'sequence_length': 2048,
  'mesh': {'dcn_data': 1, 'data': 1, 'fsdp': 32, 'sequence': 2, 'tensor': 1},
  'remat': 'dots',
  'compile_seconds': 61.4,
  'model_flops': 130e12,
  'flops': 160e12,
  'memory_traffic_bytes': 800e9,
  'memory': {
    'chip_bytes': 96 * GIB,
    'parameter_bytes': GIB,
    'optimizer_bytes': 2 * GIB,
    'activation_bytes': 10 * GIB,
    'temp_bytes': 20 * GIB,
    'total_bytes': 24 * GIB,
  },
  'collectives': [
    {
      'axes': ['fsdp', 'sequence'],
      'kind': 'all-reduce',
      'bytes': 16_000_000_000,
      'executions': 73,
    }
  ],
  'estimate': {
    'is_estimate': True,
    'seconds': {'compute': 0.35, 'memory': 0.28, 'network': 0.09},
    'network_seconds': {'fsdp sequence': 0.09},
    'bound_by': 'compute',
    'step_seconds': 0.35,
    'step_seconds_nothing_hidden': 0.72,
    'mfu': 0.81,
    'mfu_nothing_hidden': 0.39,
  },
  'fits': True,
  'advice': '',
}
LARGE = {
  name: ROW[name]
  for name in ROW
  if name not in ('flops', 'memory_traffic_bytes', 'collectives', 'estimate')
} | {
  'memory': {
    'chip_bytes': 96 * GIB,
    'parameter_bytes': GIB,
    'optimizer_bytes': 2 * GIB,
    'activation_bytes': 90 * GIB,
    'total_bytes': 120 * GIB,
  },
  'fits': False,
  'sequence_length': 8192,
  'advice': 'activations take most: model.remat=mixer',
}


def test_a_report_has_memory_exchanges_and_an_estimate_that_is_called_one():
  text = '\n'.join(compile_tables.describe(ROW))
  assert 'v5p:4x4x4: 64 chips, fsdp=32 sequence=2' in text
  assert 'temporary                20.000 GiB' in text
  assert 'all-reduce over fsdp, sequence' in text
  assert '16.0000 GB in 73 times' in text
  assert 'estimate, not a measurement' in text
  assert 'MFU at most 81.0%, 39.0% with nothing hidden' in text
  assert 'DOES NOT FIT' not in text


def test_what_does_not_fit_is_said_with_the_advice():
  text = '\n'.join(compile_tables.describe(LARGE))
  assert 'DOES NOT FIT; activations take most: model.remat=mixer' in text
  assert 'estimate' not in text


def test_the_table_has_a_line_a_row_and_names_what_is_missing():
  case = compile_suite.Case('7b', 131_072, 'h200:64')
  lines = list(compile_tables.markdown([ROW, LARGE], [case]))
  first, second = (line for line in lines if line.startswith('| 1b'))
  assert first == (
    '| 1b | 2K | fsdp=32 sequence=2 | dots | 1.00 | 2.00 | 10.00 | 20.00 '
    '| 24.00 | 25% | 160 | 800 | 16.00 | 0.35 to 0.72 | 39% to 81% |'
  )
  assert '| 125%, does not fit |' in second
  assert first.count('|') == second.count('|') == lines[6].count('|')
  assert (
    '* 1b, 8K on v5p:4x4x4 does not fit; activations take most: '
    'model.remat=mixer.'
  ) in lines
  assert lines[-1] == 'Not compiled yet: 7b 128K on h200:64.'


def test_a_run_writes_the_table_beside_the_rows(tmp_path, monkeypatch):
  path = tmp_path / 'rows.jsonl'

  def run(path, machines):
    assert machines == compile_suite.MACHINES
    path.write_text(json.dumps(ROW) + '\n')
    yield ROW

  monkeypatch.setattr(compile_suite, 'run', run)
  (line,) = compile_tables.run(path)
  assert line.startswith('| 1b | 2K |')
  written = (tmp_path / 'rows.md').read_text()
  assert line in written
  missing = len(compile_suite.CASES) - 1
  assert written.splitlines()[-1].count(' on ') == missing
