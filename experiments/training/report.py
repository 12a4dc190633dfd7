"""What a finished run leaves: its test, baselines, a sample, the figure.

Nothing else reads the test split: what is tuned, is tuned on validation.
"""

import json
import math
from typing import Any

from absl import logging

import deltanet_jax
from experiments import atomic_file
from experiments import config as config_lib
from experiments import plotting
from experiments import text_generation
from experiments.data import token_store
from experiments.data import tokenizers
from experiments.evaluation import held_out
from experiments.evaluation import text_baselines
from experiments.training import metrics as metrics_lib
from experiments.training import placement as placement_lib
from experiments.training import processes
from experiments.training import workdir as workdir_lib

_PROMPT = 'def '
_SAMPLE_TOKENS = 400
_SAMPLING = deltanet_jax.Sampling(temperature=0.7)
_LABELS = {'order_2': 'order-2 n-gram', 'zlib': 'zlib', 'xz': 'xz'}


def _sample(config, params, tokenizer) -> str:
  """Returns a prompt and its continuation, the same for the same weights."""
  pieces = text_generation.continue_text(
    text_generation.TrainedModel(
      config=config.model, params=params, tokenizer=tokenizer
    ),
    _PROMPT,
    num_tokens=_SAMPLE_TOKENS,
    seed=config.training.seed,
    sampling=_SAMPLING,
  )
  return _PROMPT + ''.join(pieces)


def _baselines(store, tokenizer) -> dict[str, float]:
  """Returns `text_baselines.measure`, empty where the text is not exact."""
  try:
    return text_baselines.measure(
      store.split('train'), store.split('test'), tokenizer
    )
  except ValueError as error:
    logging.warning('nothing to compare with: %s', error)
    return {}


def _totals(rows: list[metrics_lib.Row]) -> dict[str, float]:
  """Returns what the rows of a whole run add up to."""
  train_rows = [row for row in rows if row['kind'] == 'train']
  seconds = math.fsum(row['seconds'] for row in train_rows)
  return {
    'training_tokens': sum(int(row['tokens']) for row in train_rows),
    'training_seconds': round(seconds, 1),
    'refused_steps': train_rows[-1]['refused'],
    'wall_seconds': round(train_rows[-1]['wall_seconds'], 1),
    'goodput': round(train_rows[-1]['goodput'], 4),
  }


def write(
  config: config_lib.TrainLMConfig,
  params: Any,
  store: token_store.TokenStore,
  workdir: workdir_lib.Workdir,
  identity: dict[str, Any],
  *,
  group: processes.Group | None = None,
  placement: placement_lib.Placement | None = None,
) -> dict[str, Any]:
  """Tests a trained model; writes samples.txt, loss.png and, last, report.json.

  All processes of the run test it and make the sample; process 0 writes.

  The returned report's `held_out_...` are of the whole test split, its
  `validation_...` of the last evaluation in the loop. It carries `WARNED_PARTS`
  of the identity: where and by what the run was finished.
  """
  tokenizer = tokenizers.load_tokenizer(config.data.tokenizer)
  test = held_out.evaluate(
    config.model,
    params,
    store.split('test'),
    config.evaluation,
    placement=placement,
  )
  sample = _sample(config, params, tokenizer)

  def finish() -> dict[str, Any]:
    return _write(config, store, workdir, identity, tokenizer, test, sample)

  return (group or processes.Group()).share('final report', finish)


def _write(
  config, store, workdir, identity, tokenizer, test, sample
) -> dict[str, Any]:
  """Writes the files of the report from what was measured; returns it."""
  baselines = _baselines(store, tokenizer)
  atomic_file.replace(workdir.samples, sample + '\n')
  rows = metrics_lib.read_rows(workdir.metrics)
  plotting.draw_loss(
    rows,
    workdir.loss_figure,
    held_out=test['bits_per_byte'],
    references={_LABELS[name]: value for name, value in baselines.items()},
  )
  last = [row for row in rows if row['kind'] == 'eval'][-1]
  report = {
    'step': last['step'],
    'held_out_bits_per_byte': test['bits_per_byte'],
    'held_out_tokens': test['tokens'],
    'held_out_bytes': store.meta.splits['test'].num_bytes,
    'validation_bits_per_byte': last['bits_per_byte'],
    'baselines': baselines,
    'parameters': deltanet_jax.count_parameters(config.model),
    **_totals(rows),
    'sample': sample,
    **{part: identity[part] for part in workdir_lib.WARNED_PARTS},
  }
  atomic_file.replace(workdir.report, json.dumps(report, indent=2) + '\n')
  return report


def read(workdir: workdir_lib.Workdir) -> dict[str, Any] | None:
  """Returns the report of a finished run, or None.

  Raises:
    ValueError: the file is not JSON.
  """
  if not workdir.report.exists():
    return None
  try:
    return json.loads(workdir.report.read_text())
  except ValueError as error:
    raise ValueError(
      f'{workdir.report} is not JSON ({error}); delete it: the same command '
      'writes it again'
    ) from error


def describe(report: dict[str, Any], workdir: workdir_lib.Workdir) -> str:
  """Returns the lines a person reads at the end."""
  lines = [
    f'sample:\n{report["sample"]}\n',
    f'plot        {workdir.loss_figure}',
    f'metrics     {workdir.metrics}',
    f'checkpoint  {workdir.checkpoints / str(report["step"])}',
    f'held-out bits/byte {report["held_out_bits_per_byte"]:.3f}',
  ]
  if baselines := report['baselines']:
    compared = ', '.join(
      f'{_LABELS[name]} {value:.3f}' for name, value in baselines.items()
    )
    lines.append(f'on the same bytes: {compared}')
  return '\n'.join(lines)
