"""Continues a prompt with the newest checkpoint of a run.

python -m experiments.generate_text --workdir=runs/laptop --prompt='def '
"""

import sys

from absl import app
from absl import flags
from absl import logging

import deltanet_jax
from experiments import text_generation
from experiments.training import checkpoints

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run.', required=True
)
_PROMPT = flags.DEFINE_string(
  'prompt', None, 'Text to continue; not given: read from standard input.'
)
_NUM_TOKENS = flags.DEFINE_integer('num_tokens', 256, 'Tokens to write.')
_GREEDY = flags.DEFINE_bool('greedy', False, 'Take the most likely token.')
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'Divides the logits.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw among the k likeliest; 0: all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw among this probability mass.')
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the drawing.')


def main(argv: list[str]) -> None:
  """Prints the prompt and, as it is written, its continuation."""
  if len(argv) > 1:
    raise app.UsageError(f'flags only, got the arguments {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  try:
    sampling = deltanet_jax.Sampling(
      greedy=_GREEDY.value,
      temperature=_TEMPERATURE.value,
      top_k=_TOP_K.value,
      top_p=_TOP_P.value,
    )
    model = text_generation.load(_WORKDIR.value)
    prompt = sys.stdin.read() if _PROMPT.value is None else _PROMPT.value
    pieces = text_generation.continue_text(
      model,
      prompt,
      num_tokens=_NUM_TOKENS.value,
      seed=_SEED.value,
      sampling=sampling,
    )
  except (ValueError, checkpoints.CheckpointsDamagedError) as error:
    raise SystemExit(f'error: {error}') from error
  print(prompt, end='', flush=True)
  for piece in pieces:
    print(piece, end='', flush=True)
  print()


if __name__ == '__main__':
  app.run(main)
