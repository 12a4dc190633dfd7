import subprocess

from experiments.data import text_files
from experiments.data import token_store
from experiments.data import tokenizers
from tests.experiments import tiny_run


def run(program, *arguments):
  return subprocess.run(
    [*tiny_run.program(program), *map(str, arguments)],
    cwd=tiny_run.ROOT,
    check=False,
    capture_output=True,
    text=True,
  )


def test_train_a_tokenizer_and_tokenise_with_it(tmp_path):
  corpus = tmp_path / 'corpus'
  corpus.mkdir()
  for i in range(9):
    (corpus / f'{i}.txt').write_text(f'a text about {i} snakes\n' * 9)
  files = f'--files={corpus}/*'
  path = tmp_path / 'tokenizer.json'
  trained = run(
    'train_tokenizer', files, '--vocab_size=280', f'--output={path}'
  )
  assert trained.returncode == 0, trained.stderr
  assert tokenizers.load_tokenizer(str(path)).vocab_size == 280

  refused = run('train_tokenizer', files, f'--output={path}')
  assert refused.returncode != 0
  assert 'exists' in refused.stderr + refused.stdout

  store_path = tmp_path / 'store'
  written = run(
    'tokenize_text',
    files,
    f'--tokenizer={path}',
    f'--output={store_path}',
    '--held_out_modulus=3',
  )
  assert written.returncode == 0, written.stderr
  store = token_store.TokenStore.open(store_path)
  documents = text_files.Documents(text_files.find_files([f'{corpus}/*']))
  splits = [token_store.split_of(d.id, 3) for d in documents]
  for name, split in store.meta.splits.items():
    assert split.num_documents == splits.count(name)
  assert store.summary() in written.stderr
