"""Trains a byte-level BPE tokenizer on the documents of the train split.

Example:
    python -m experiments.train_tokenizer --files='corpus/**/*.txt' \
        --vocab_size=8192 --output=tokenizer.json
"""

from collections.abc import Sequence
import pathlib

from absl import app
from absl import flags
from absl import logging

from experiments import atomic_file
from experiments import config
from experiments.data import preparation
from experiments.data import token_store
from experiments.data import tokenizers


def define_flags() -> None:
  """Defines the flags of this program; their defaults are DataConfig's."""
  default = config.DataConfig()
  flags.DEFINE_list('files', [], 'Glob patterns; none: the default corpus.')
  flags.DEFINE_string('text_field', default.text_field, 'Field of the text.')
  flags.DEFINE_integer('vocab_size', 8192, 'Ids, bytes and BOS included.')
  flags.DEFINE_string('output', None, 'File to write.', required=True)
  flags.DEFINE_integer(
    'held_out_modulus', default.held_out_modulus, 'Two in N are left unread.'
  )


def main(argv: Sequence[str]) -> None:
  """Trains the tokenizer that the flags describe."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}: quote glob patterns')
  args = flags.FLAGS
  if pathlib.Path(args.output).exists():
    raise app.UsageError(f'{args.output} exists: choose another --output')
  data_config = config.DataConfig(
    files=tuple(args.files),
    text_field=args.text_field,
    held_out_modulus=args.held_out_modulus,
  )
  texts = (
    document.text
    for document in preparation.read_documents(data_config)
    if token_store.split_of(document.id, args.held_out_modulus) == 'train'
  )
  content = tokenizers.train_byte_level_bpe(texts, args.vocab_size)
  atomic_file.replace(args.output, content)
  tokenizer = tokenizers.load_tokenizer(args.output)
  logging.info('Wrote %s: %d ids', args.output, tokenizer.vocab_size)


if __name__ == '__main__':
  define_flags()
  app.run(main)
