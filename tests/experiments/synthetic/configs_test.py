"""Every named run and sweep builds; bad ones are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet_jax import mixers
from experiments.synthetic import config as config_lib
from experiments.synthetic import configs
from experiments.synthetic import mad
from experiments.synthetic import mad_fuzzy
from experiments.synthetic import mad_memory
from experiments.synthetic import model
from experiments.synthetic import mqar
from experiments.synthetic import regbench
from experiments.synthetic import word_problems


@pytest.mark.parametrize('name', list(configs.SWEEPS))
def test_every_sweep_builds(name):
  runs = configs.SWEEPS[name]()
  assert len({config_lib.key(run) for run in runs}) == len(runs)
  models = {(run.model, run.block): run for run in runs}
  for run in models.values():
    assert model.count_parameters(run) > 0


@pytest.mark.parametrize('size', ['cpu', 'paper'])
@pytest.mark.parametrize('mixer', list(mixers.MIXERS))
def test_every_mixer_can_be_named(mixer, size):
  run = configs.build('mqar', size, mixer)
  assert mixer in run.model.mixers
  params = jax.eval_shape(lambda: model.init(run, jax.random.key(0)))
  inputs = jnp.zeros((2, run.task.sequence_length), jnp.int32)
  logits = jax.eval_shape(lambda p: model.apply(run, p, inputs), params)
  assert logits.shape == (*inputs.shape, run.task.vocab_size)


def test_clean_runs_select_on_other_examples():
  run = configs.build('in_context_recall', 'paper', 'delta_net')
  cleaned = config_lib.clean(run)
  assert (run.training.metric, run.training.schedule) == ('macro', 'constant')
  assert cleaned.protocol == 'clean'
  assert cleaned.training.metric == 'token'
  assert cleaned.training.schedule == 'cosine'
  assert config_lib.key(run) != config_lib.key(cleaned)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: configs.build('sums', 'cpu', 'delta_net'), 'got sums/cpu'),
    (lambda: configs.build('mqar', 'cpu', 'memory'), "got .'memory'"),
    (lambda: mqar.MQARConfig(num_pairs=17), 'got sequence_length=64'),
    (lambda: mqar.MQARConfig(vocab_size=64), 'got vocab_size=64'),
    (lambda: mad.NoisyRecallConfig(vocab_size=16), 'and vocab_size=16'),
    (lambda: mad.NoisyRecallConfig(noise_fraction=1.1), 'fraction=1.1'),
    (lambda: mad.RecallConfig(length=7), 'got length=7'),
    (lambda: mad_fuzzy.FuzzyRecallConfig(vocab_size=6), 'got vocab_size=6'),
    (lambda: mad_fuzzy.FuzzyRecallConfig(sequence_length=17), 'length=17'),
    (lambda: mad_memory.MemorizationConfig(sequence_length=3), 'length=3'),
    (lambda: mad_memory.CompressionConfig(vocab_size=1), 'vocab_size=1'),
    (lambda: regbench.RegBenchConfig(max_length=2), 'max_length=2'),
    (lambda: word_problems.WordProblemConfig(group='S2'), "got group='S2'"),
    (lambda: word_problems.WordProblemConfig(group='Z1'), "got group='Z1'"),
    (lambda: config_lib.TrainingConfig(batch_size=200_000), 'got 200000'),
    (lambda: config_lib.BlockConfig(embedding_dropout=1.0), 'got 1.0'),
  ],
)
def test_refuses_with_rule_and_value(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_the_auto_encoder_reads_the_last_position_alone():
  run = configs.build('selective_copying', 'cpu', 'delta_net')
  block = config_lib.BlockConfig(readout='auto_encoder', output_bias=True)
  run = dataclasses.replace(run, block=block)
  params = model.init(run, jax.random.key(0))
  tokens = jnp.ones((1, 16), jnp.int32)
  logits = model.apply(run, params, tokens)
  longer = model.apply(run, params, jnp.ones((1, 17), jnp.int32))
  assert logits.shape == (1, 16, run.task.vocab_size)
  assert np.any(logits[0, 0] != longer[0, 0])
