import types

import jax
import pytest

from experiments import ahead_of_time
from experiments import chips


def add(x, y):
  return {'sum': x + y, 'platforms': jax.config.jax_platforms}


def fail():
  raise ValueError('the reason')


@pytest.fixture
def tools(tmp_path):
  for part in ahead_of_time.PARTS:
    path = tmp_path / part
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  return tmp_path


def test_what_is_missing_is_named_with_the_command_that_brings_it(tmp_path):
  (tmp_path / 'nvidia/cu13/bin').mkdir(parents=True)
  (tmp_path / 'nvidia/cu13/bin/nvdisasm').touch()
  reason = ahead_of_time.missing(tmp_path)
  assert 'jax_cuda13_plugin, ' in reason and 'bin/ptxas, ' in reason
  assert 'nvdisasm' not in reason
  assert reason.endswith('run `make setup_aot`')
  with pytest.raises(ahead_of_time.ToolsMissingError, match='make setup_aot'):
    ahead_of_time.run(f'{__name__}:add', {}, tools=tmp_path)


def test_a_tpu_takes_its_own_compiler_alone(tmp_path):
  parts = ahead_of_time.parts_for(chips.target('v5p:2x2x1').chip)
  reason = ahead_of_time.missing(tmp_path, parts)
  assert 'libtpu/libtpu.so in ' in reason and 'ptxas' not in reason
  assert 'bin/ptxas' in ahead_of_time.missing(
    tmp_path, ahead_of_time.parts_for(chips.target('h200').chip)
  )


def test_nothing_is_missing_once_all_is_there(tools):
  assert ahead_of_time.missing(tools) is None


def test_a_function_runs_in_a_process_without_gpu_libraries(tools, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  found = ahead_of_time.run(
    'tests.experiments.ahead_of_time_test:add', {'x': 1, 'y': 2}, tools=tools
  )
  assert found == {'sum': 3, 'platforms': 'cpu'}


def test_the_reason_of_a_failure_is_passed_on(tools):
  with pytest.raises(
    ahead_of_time.CompilationError, match='status 1:\n(?s:.*)the reason'
  ):
    ahead_of_time.run(
      'tests.experiments.ahead_of_time_test:fail', {}, tools=tools
    )


def test_an_unknown_target_is_refused():
  with pytest.raises(ValueError, match="must be one of .*, got 'abacus'"):
    ahead_of_time.lower_for('abacus', jax.jit(abs), (1.0,))


def test_a_slice_whose_devices_are_cores_is_refused(monkeypatch):
  cores = types.SimpleNamespace(devices=[None] * 32)
  monkeypatch.setattr(
    ahead_of_time.topologies, 'get_topology_desc', lambda **_: cores
  )
  with pytest.raises(ValueError, match='32 devices for 16 chips'):
    ahead_of_time.devices(chips.target('v4:2x2x4'))


def test_a_gpu_without_a_description_is_refused():
  with pytest.raises(ValueError, match="must be one of .*, got 'a100'"):
    ahead_of_time.devices(chips.target('a100:8'))
