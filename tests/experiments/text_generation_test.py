import json
import shutil

import jax
import jax.numpy as jnp
import pytest

import deltanet_jax
from experiments import text_generation
from experiments.data import tokenizers
from experiments.training import checkpoints
from tests.experiments import tiny_run

GREEDY = deltanet_jax.Sampling(greedy=True)
TOKENIZER = tokenizers.ByteTokenizer()
MODEL = deltanet_jax.ModelConfig(
  vocab_size=300,
  model_width=8,
  num_layers=1,
  num_heads=2,
  mlp_width=8,
  dtype='float32',
)


def continue_text(params, prompt, num_tokens=12, sampling=GREEDY, seed=0):
  model = text_generation.TrainedModel(
    config=MODEL, params=params, tokenizer=TOKENIZER
  )
  pieces = text_generation.continue_text(
    model, prompt, num_tokens=num_tokens, seed=seed, sampling=sampling
  )
  return ''.join(pieces)


@pytest.fixture(scope='module')
def params():
  params = deltanet_jax.init(MODEL, jax.random.key(3))
  # Only letters are ever likely: the text is exact, and BOS does not come.
  params = jax.tree.map(lambda leaf: 5 * leaf, params)
  letters = jnp.arange(300) // 32 == 3
  params['output']['kernel'] *= letters.astype(jnp.float32)[None]
  return params


@pytest.mark.parametrize('prompt', ['', 'ab', 'Grüße', 'long ' * 70])
def test_greedy_is_the_argmax_of_the_full_forward_pass(params, prompt):
  written = continue_text(params, prompt)
  assert len(set(written)) > 1
  ids = [TOKENIZER.bos_id, *TOKENIZER.encode(prompt + written).tolist()]
  logits, _ = deltanet_jax.apply(MODEL, params, jnp.array([ids]))
  best = jnp.argmax(logits[0, :-1], axis=-1)[-12:]
  assert best.tolist() == ids[-12:]


def test_a_seed_gives_its_text_again(params):
  drawn = [
    continue_text(params, 'a', sampling=deltanet_jax.Sampling(), seed=seed)
    for seed in (1, 1, 2)
  ]
  assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize('token', [TOKENIZER.bos_id, 280])
def test_neither_bos_nor_an_id_without_text_is_written(token):
  params = deltanet_jax.init(MODEL, jax.random.key(0))
  params = jax.tree.map(jnp.zeros_like, params)
  params['embedding']['embedding'] += 1
  params['final_norm']['scale'] += 1
  kernel = params['output']['kernel']
  params['output']['kernel'] = kernel.at[:, token].set(1)
  assert continue_text(params, 'a') == ''


@pytest.fixture
def run_copy(finished_run, tmp_path):
  return shutil.copytree(finished_run.root, tmp_path / 'run')


def test_loading_changes_nothing(run_copy, finished_run):
  old = tiny_run.contents(run_copy)
  model = text_generation.load(run_copy)
  assert model.config == finished_run.config.model
  assert model.tokenizer.name == 'byte'
  assert tiny_run.contents(run_copy) == old


def test_a_damaged_checkpoint_is_passed_over(run_copy):
  newest = run_copy / 'checkpoints' / '60'
  (newest / 'CHECKSUMS.json').write_text('{}')
  fallback = text_generation.load(run_copy)
  shutil.rmtree(newest)
  expected = text_generation.load(run_copy)
  for found, wanted in zip(
    jax.tree.leaves(fallback.params),
    jax.tree.leaves(expected.params),
    strict=True,
  ):
    assert found.tobytes() == wanted.tobytes()


def test_what_is_missing_or_damaged_is_named(run_copy, tmp_path):
  def refused(match, error=ValueError, root=run_copy):
    with pytest.raises(error, match=match):
      text_generation.load(root)

  refused('config.json is missing', root=tmp_path / 'none')
  for seal in run_copy.glob('checkpoints/*/CHECKSUMS.json'):
    seal.unlink()
  refused('no checkpoint in', checkpoints.CheckpointsDamagedError)
  shutil.rmtree(run_copy / 'checkpoints')
  refused('no checkpoint yet')
  config = run_copy / 'config.json'
  identity = json.loads(config.read_text())
  config.write_text(json.dumps(identity | {'tokenizer': 'another'}))
  refused('has changed since the training')
  identity['config']['model']['num_layers'] = 'two'
  config.write_text(json.dumps(identity))
  refused('config.model.num_layers must be')
  config.write_text('[]')
  refused('does not describe a run')
  config.write_text('{')
  refused('is not JSON')
