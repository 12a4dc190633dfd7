import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deltanet_jax
from experiments import config as config_lib
from experiments.training import spike_guard
from experiments.training import train_step
from tests.experiments import tiny_run

CONFIG = config_lib.TrainLMConfig(
  model=deltanet_jax.ModelConfig(
    vocab_size=19,
    model_width=8,
    num_layers=1,
    num_heads=2,
    mlp_width=8,
    dtype='float32',
  ),
  data=config_lib.DataConfig(batch_size=8, sequence_length=12),
  optimizer=config_lib.OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=1),
)
LENGTHS = (13, 1, 2, 9, 5, 13, 3, 0)  # Tokens of a row, the rest is padding.

pytestmark = pytest.mark.usefixtures('standard_promotion')


def unequal_batch():
  draw = np.random.default_rng(0)
  tokens = draw.integers(19, size=(8, 13), dtype=np.int32)
  segment_ids = np.zeros((8, 13), np.int32)
  for row, length in enumerate(LENGTHS):
    segment_ids[row, :length] = 1
    segment_ids[row, 6:length] = 2  # A second document from token 6 on.
  return {'tokens': jnp.array(tokens), 'segment_ids': jnp.array(segment_ids)}


def predicted(length):
  return max(length - 1, 0) - (length > 6)


def flat(tree):
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_same_bits(found, expected):
  found, expected = flat(found), flat(expected)
  assert found.keys() == expected.keys()
  for name, leaf in found.items():
    assert leaf.tobytes() == expected[name].tobytes(), name


def test_what_counts_is_neither_padding_nor_the_first_of_a_document():
  batch = unequal_batch()
  params = deltanet_jax.init(CONFIG.model, jax.random.key(0))
  losses, counts = train_step.token_losses(CONFIG.model, params, batch)
  assert losses.shape == counts.shape == (8, 12)
  for row, length in enumerate(LENGTHS):
    expected = [t < length and t != 6 for t in range(1, 13)]
    assert counts[row].tolist() == expected


def test_without_segments_a_row_is_one_document():
  batch = unequal_batch() | {'segment_ids': jnp.ones((8, 13), jnp.int32)}
  params = deltanet_jax.init(CONFIG.model, jax.random.key(0))
  expected, _ = train_step.token_losses(CONFIG.model, params, batch)
  del batch['segment_ids']
  losses, counts = train_step.token_losses(CONFIG.model, params, batch)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert counts.all() and counts.dtype == bool


def test_what_does_not_count_changes_nothing():
  batch = unequal_batch()
  state = train_step.init_state(CONFIG)
  padding = batch['segment_ids'] == 0
  other = batch | {'tokens': jnp.where(padding, 7, batch['tokens'])}
  step = train_step.build(CONFIG)
  first, metrics = step(jax.tree.map(jnp.copy, state), batch)
  second, other_metrics = step(state, other)
  assert_same_bits(metrics, other_metrics)
  assert_same_bits(first, second)


def test_a_loss_is_that_of_the_documents_alone():
  batch = unequal_batch()
  params = deltanet_jax.init(CONFIG.model, jax.random.key(0))
  losses, _ = train_step.token_losses(CONFIG.model, params, batch)
  for start, stop in ((0, 6), (6, 13)):
    alone = batch['tokens'][:1, start:stop]
    logits, _ = deltanet_jax.apply(CONFIG.model, params, alone[:, :-1])
    expected = optax.softmax_cross_entropy_with_integer_labels(
      logits, alone[:, 1:]
    )
    np.testing.assert_allclose(
      losses[:1, start : stop - 1], expected, rtol=1e-5
    )


def test_loss_and_gradient_are_those_of_the_mean_over_tokens():
  batch, state = unequal_batch(), train_step.init_state(CONFIG)

  def mean_loss(params):
    losses, counts = train_step.token_losses(CONFIG.model, params, batch)
    return jnp.mean(losses, where=counts)

  loss, gradients = jax.value_and_grad(mean_loss)(state['params'])
  norm = optax.tree.norm(gradients)
  state, metrics = train_step.build(CONFIG)(state, batch)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-6)
  np.testing.assert_allclose(metrics['gradient_norm'], norm, rtol=1e-5)
  clipped = min(1.0, CONFIG.optimizer.clip_norm / float(norm))
  found = flat(optax.tree.get(state['optimizer'], 'mu'))
  for name, gradient in flat(gradients).items():
    expected = (1 - CONFIG.optimizer.b1) * clipped * gradient
    np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6)


def test_the_guard_takes_in_the_loss_and_the_norm_before_clipping():
  state, metrics = train_step.build(CONFIG)(
    train_step.init_state(CONFIG), unequal_batch()
  )
  assert metrics['gradient_norm'] > CONFIG.optimizer.clip_norm
  _, expected = spike_guard.judge(
    spike_guard.init(CONFIG.training),
    metrics['loss'],
    metrics['gradient_norm'],
    CONFIG.training,
  )
  found = flat(state['guard'])
  for name, leaf in flat(expected).items():
    np.testing.assert_allclose(found[name], leaf, rtol=1e-6)


def test_the_seed_decides_the_parameters_alone():
  state = train_step.init_state(CONFIG)
  assert_same_bits(train_step.init_state(CONFIG), state)
  other = train_step.init_state(tiny_run.replace(CONFIG, 'training', seed=1))
  kernel, other_kernel = (
    s['params']['output']['kernel'] for s in (state, other)
  )
  assert (kernel != other_kernel).all()


@pytest.mark.parametrize('num_micro_batches', [2, 8])
def test_micro_batches_of_unequal_masks_equal_one_batch(num_micro_batches):
  batch = unequal_batch()
  split = tiny_run.replace(
    CONFIG, 'training', gradient_accumulation_steps=num_micro_batches
  )
  whole, metrics = train_step.build(CONFIG)(
    train_step.init_state(CONFIG), batch
  )
  parts, split_metrics = train_step.build(split)(
    train_step.init_state(split), batch
  )
  assert metrics['tokens'] == sum(predicted(length) for length in LENGTHS)
  assert split_metrics['tokens'] == metrics['tokens']
  for name in ('loss', 'gradient_norm'):
    np.testing.assert_allclose(metrics[name], split_metrics[name], rtol=1e-6)
  # Adam's first moments are the gradients, its updates their signs.
  found = flat(optax.tree.get(parts['optimizer'], 'mu'))
  for name, leaf in flat(optax.tree.get(whole['optimizer'], 'mu')).items():
    np.testing.assert_allclose(leaf, found[name], rtol=0, atol=1e-6)


def test_a_batch_of_padding_alone_has_no_loss_and_no_gradient():
  batch = unequal_batch()
  batch['segment_ids'] = jnp.zeros_like(batch['segment_ids'])
  _, metrics = train_step.build(CONFIG)(train_step.init_state(CONFIG), batch)
  assert (metrics['tokens'], metrics['loss'], metrics['gradient_norm']) == (
    0,
    0,
    0,
  )


def test_a_step_decays_the_parameters_it_updates():
  config = tiny_run.replace(
    CONFIG, 'optimizer', initial_learning_rate=1e-2, weight_decay=0.5
  )
  batch = unequal_batch()
  batch['segment_ids'] = jnp.zeros_like(batch['segment_ids'])
  state = train_step.init_state(config)
  kernel = np.array(state['params']['output']['kernel'])
  state, _ = train_step.build(config)(state, batch)
  np.testing.assert_allclose(
    state['params']['output']['kernel'], (1 - 1e-2 * 0.5) * kernel, rtol=1e-6
  )


def test_the_state_is_donated():
  state = train_step.init_state(CONFIG)
  train_step.build(CONFIG)(state, unequal_batch())
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state['params']))


def test_steps_lower_the_loss_of_a_batch():
  state, step = train_step.init_state(CONFIG), train_step.build(CONFIG)
  losses = []
  for _ in range(20):
    state, metrics = step(state, unequal_batch())
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] - 0.5
  assert state['step'] == 20


def test_a_refused_step_changes_no_bit_of_parameters_and_optimizer():
  step = train_step.build(CONFIG)
  state, _ = step(train_step.init_state(CONFIG), unequal_batch())
  # Infinite weights: the loss is not finite, whatever the batch is.
  state['params']['output']['kernel'] *= jnp.inf
  before = flat({name: state[name] for name in ('params', 'optimizer')})
  before = {name: leaf.copy() for name, leaf in before.items()}
  state, metrics = step(state, unequal_batch())
  assert not np.isfinite(metrics['loss'])
  assert (metrics['refused'], metrics['refused_in_a_row']) == (1, 1)
  assert state['step'] == 2
  after = flat({name: state[name] for name in ('params', 'optimizer')})
  for name, leaf in after.items():
    assert leaf.tobytes() == before[name].tobytes(), name
