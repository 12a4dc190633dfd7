import jax
import jax.numpy as jnp
import pytest

import deltanet_jax
from experiments import text_generation
from experiments.data import tokenizers

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


def test_the_model_of_a_run_is_loaded(finished_run):
  model = text_generation.load(finished_run.root)
  assert model.config == finished_run.config.model
  assert model.tokenizer.name == 'byte'
  assert jax.tree.structure(model.params) == jax.tree.structure(
    jax.eval_shape(lambda: deltanet_jax.init(model.config, jax.random.key(0)))
  )
