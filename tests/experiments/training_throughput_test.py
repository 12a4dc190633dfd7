import dataclasses
import json
import statistics

import jax
import pytest

import deltanet_jax
from experiments import training_throughput

pytestmark = pytest.mark.usefixtures('standard_promotion')

TINY = training_throughput.Setting(size='tiny', tokens=32)


def test_tokens_are_trained_with_little_recomputed_where_that_fits():
  row = training_throughput.measure('delta_net', 16, TINY)
  assert (row['batch'], row['length'], row['remat']) == (2, 16, 'dots')
  assert not row['scan_layers']
  assert len(row['step_seconds']) == 5
  median = sorted(row['step_seconds'])[2]
  assert row['tokens_per_s'] == pytest.approx(32 / median)
  assert row['needed_bytes'] > 3 * 4 * row['parameters']
  assert row['mfu'] is None and row['paper_tokens_per_s'] is None
  assert json.loads(json.dumps(row)) == row
  assert 'dots' in training_throughput.format_row(row)


def test_what_does_not_fit_is_tried_with_more_recomputed(monkeypatch):
  tried = []

  def run(config, limit, deadline):
    del limit, deadline
    tried.append((config.data.sequence_length, config.model.remat))
    if config.model.remat == 'dots':
      raise training_throughput._NotRunError('too large')
    return {'step_seconds': [1.0], 'compile_seconds': 1.0, 'needed_bytes': 1}

  monkeypatch.setattr(training_throughput, '_run', run)
  rows = list(training_throughput.rows([TINY], ['delta_net'], [16, 32]))
  assert tried == [(16, 'dots'), (16, 'full'), (32, 'full')]
  assert [row['remat'] for row in rows] == ['full', 'full']
  assert rows[0]['too_large'] == {'dots': 'too large'}
  assert rows[0]['tokens_per_s'] == 32


def test_a_row_that_fits_in_no_way_has_a_reason():
  setting = dataclasses.replace(TINY, memory_limit=1)
  row = training_throughput.measure('delta_net', 16, setting, ('full',))
  assert row['tokens_per_s'] is None
  assert 'full: it needs 0.0 GiB of memory' in row['reason']
  assert row['reason'] in training_throughput.format_row(row)


def test_nothing_is_started_late():
  setting = dataclasses.replace(TINY, row_seconds=-1.0)
  row = training_throughput.measure('delta_net', 16, setting)
  assert row['reason'] == '-1 s had passed'


def test_other_errors_than_missing_memory_are_raised(monkeypatch):
  def fail(*_):
    raise jax.errors.JaxRuntimeError('INTERNAL: broken')

  monkeypatch.setattr(training_throughput, '_timed_steps', fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL: broken'):
    training_throughput.measure('delta_net', 16, TINY, ('none',))


def test_operations_are_of_parameters_and_attention():
  model = deltanet_jax.preset('transformer', 'tiny')
  parameters = deltanet_jax.count_parameters(model) - 256 * 64
  assert training_throughput.flops_per_token(model, 100) == (
    6 * parameters + 6 * 4 * 64 * 100
  )
  recurrent = deltanet_jax.preset('delta_net', 'tiny')
  assert training_throughput.flops_per_token(recurrent, 1) == (
    training_throughput.flops_per_token(recurrent, 100)
  )


@pytest.mark.parametrize(
  ('name', 'length', 'expected'),
  [('delta_net', 2048, 41500), ('mamba', 16384, 26000), ('gla', 1024, None)],
)
def test_the_papers_numbers_stand_beside_its_sizes(name, length, expected):
  find = training_throughput._paper_tokens_per_s
  setting = training_throughput.Setting()
  assert find(name, length, setting) == expected
  assert find(name, length, TINY) is None


def test_a_length_that_does_not_divide_the_tokens_is_refused():
  with pytest.raises(ValueError, match='must divide the 32 tokens .* got 24'):
    TINY.batch_size(24)


@pytest.mark.parametrize('axis', ['fsdp', 'sequence'])
def test_a_mesh_trains_as_one_device_does(axis):
  alone = training_throughput.measure('delta_net', 16, TINY)
  mesh = training_throughput.parse_mesh(f'{axis}=2')
  setting = dataclasses.replace(TINY, tokens=16, mesh=mesh)
  row = training_throughput.measure('delta_net', 16, setting)
  assert (row['batch'], row['mesh']) == (2, {axis: 2})
  assert row['losses'] == pytest.approx(alone['losses'], rel=1e-5)
  assert row['tokens_per_s'] == pytest.approx(
    32 / statistics.median(row['step_seconds'])
  )
  assert f'{axis}=2' in training_throughput.format_row(row)


@pytest.mark.parametrize('text', ['fsdp', 'rows=2', 'fsdp=0', 'fsdp=2,data=2'])
def test_a_text_that_is_no_mesh_is_refused(text):
  with pytest.raises(ValueError, match='must be like fsdp=2.tensor=4'):
    training_throughput.parse_mesh(text)


def test_axes_of_a_mesh_are_multiplied():
  mesh = training_throughput.parse_mesh('fsdp=2+tensor=4')
  setting = dataclasses.replace(TINY, mesh=mesh)
  assert setting.axes == {'fsdp': 2, 'tensor': 4}
  assert (setting.num_devices, setting.batch_size(16)) == (8, 16)
