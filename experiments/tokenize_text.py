"""Tokenises text files into a token store.

Example:
    python -m experiments.tokenize_text --files='corpus/**/*.jsonl.gz' \
        --tokenizer=tokenizer.json --output=store
"""

from collections.abc import Sequence

from absl import app
from absl import flags
from absl import logging

from experiments import config
from experiments.data import preparation
from experiments.data import tokenizers


def define_flags() -> None:
  """Defines the flags of this program; their defaults are DataConfig's."""
  default = config.DataConfig()
  flags.DEFINE_list('files', [], 'Glob patterns; none: the default corpus.')
  flags.DEFINE_string('text_field', default.text_field, 'Field of the text.')
  flags.DEFINE_string(
    'tokenizer', default.tokenizer, '"byte" or a tokenizer.json.'
  )
  flags.DEFINE_string('output', None, 'Directory of the store.', required=True)
  flags.DEFINE_integer(
    'held_out_modulus',
    default.held_out_modulus,
    'One document in this many is for validation, and one for the test.',
  )
  flags.DEFINE_float(
    'max_bad_fraction',
    default.max_bad_fraction,
    'Share of unreadable documents that is still accepted.',
  )


def main(argv: Sequence[str]) -> None:
  """Writes the store that the flags describe."""
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}: quote glob patterns')
  args = flags.FLAGS
  data_config = config.DataConfig(
    files=tuple(args.files),
    text_field=args.text_field,
    tokenizer=args.tokenizer,
    held_out_modulus=args.held_out_modulus,
    max_bad_fraction=args.max_bad_fraction,
  )
  tokenizer = tokenizers.load_tokenizer(args.tokenizer)
  store = preparation.write_documents(data_config, tokenizer, args.output)
  logging.info('%s', store.summary())


if __name__ == '__main__':
  define_flags()
  app.run(main)
