import json

import pytest

from experiments import chips
from experiments import compile_suite
from experiments import pod_compilation
from experiments.training import mesh as mesh_lib
from tests.experiments import compile_tables_test


@pytest.mark.parametrize('case', compile_suite.CASES)
def test_every_case_takes_all_chips_and_a_million_tokens(case):
  config, machine = case.config, chips.target(case.machine)
  data = config.data
  assert data.batch_size * data.sequence_length == 2**20
  sizes = mesh_lib.sizes(
    pod_compilation.with_mesh(config, machine), machine.num_chips
  )
  assert sizes['fsdp'] * sizes['sequence'] == machine.num_chips


def test_rows_that_are_there_are_not_compiled_again(tmp_path, monkeypatch):
  path = tmp_path / 'new' / 'rows.jsonl'
  compiled = []

  def report(target, config, *, choose_remat):
    assert choose_remat
    length = config.data.sequence_length
    compiled.append((target, config.model.model_width, length))
    if len(compiled) == 3:
      raise KeyboardInterrupt
    found = dict(compile_tables_test.ROW)
    del found['model']
    return found | {'target': target, 'sequence_length': length}

  monkeypatch.setattr(pod_compilation, 'report', report)
  with pytest.raises(KeyboardInterrupt):
    list(compile_suite.run(path))
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [row['model'] for row in rows] == ['340m', '340m']
  (of_tpu,) = (m for m in compile_suite.MACHINES if m.startswith('v'))
  slices = list(compile_suite.run(path, [of_tpu]))
  assert {row['target'] for row in slices} == {of_tpu}
  again = list(compile_suite.run(path))
  assert len(again) + len(slices) == len(compile_suite.CASES) - 2
  # The one that was interrupted.
  assert compiled[2] == compiled[3 + len(slices)]
  assert not compile_suite.missing(path)
