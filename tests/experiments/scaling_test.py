import json

import pytest

from experiments import chips
from experiments import pod_compilation
from experiments import scaling
from experiments.training import mesh as mesh_lib


@pytest.mark.parametrize('case', scaling.CASES)
def test_every_case_takes_its_devices_along_one_axis(case):
  implementation, axis, count = case
  run = scaling.config(case)
  tokens = run.data.batch_size * run.data.sequence_length
  assert tokens == scaling.TOKENS[implementation]
  machine = chips.target(f'h200:{count}')
  sizes = mesh_lib.sizes(pod_compilation.with_mesh(run, machine), count)
  assert {a: n for a, n in sizes.items() if n > 1} == (
    {axis: count} if count > 1 else {}
  )


def test_a_suite_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
  path = tmp_path / 'new' / 'rows.jsonl'
  compiled = []

  def report(target, config):
    del config
    compiled.append(target)
    if len(compiled) == 4:
      raise KeyboardInterrupt
    sent = {'axes': ['fsdp'], 'kind': 'all-gather', 'executions': 1}
    return {
      'target': target,
      'flops': 3e12,
      'memory_traffic_bytes': 2e9,
      'collectives': [sent | {'bytes': 5e8}, sent | {'bytes': 1e9}],
    }

  monkeypatch.setattr(pod_compilation, 'report', report)
  with pytest.raises(KeyboardInterrupt):
    list(scaling.run(path))
  rest = list(scaling.run(path))
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  names = scaling.Case._fields
  assert [tuple(r[n] for n in names) for r in rows] == list(scaling.CASES)
  assert rows[3:] == rest
  assert rows[0]['formula_bytes'] == 0
  assert rows[1]['formula_bytes'] > 0
  assert scaling.describe(rows[1]).startswith(
    'xla fsdp 2: 3.00 TFLOP, 2.0 GB moved, 1.5000 GB sent, by formula '
  )
  assert scaling.describe(rows[-1]) == (
    'mosaic_gpu sequence 8: 3.00 TFLOP, 2.0 GB moved, 1.5000 GB sent'
  )
  assert not list(scaling.run(path))
