"""MAD's grid has the published sizes."""

import pytest

from experiments.synthetic import configs_mad
from experiments.synthetic import published


def test_the_grid_has_66_settings_and_396_runs():
  counts = {n: len(list(configs_mad.settings(n))) for n in configs_mad.TASKS}
  assert tuple(counts) == published.MAD_TASKS
  assert list(counts.values()) == [11, 11, 11, 6, 14, 13]
  assert len(configs_mad.mad_paper()) == 396


def test_compression_alone_is_decoded_and_recall_trains_on_all_tokens():
  for name in configs_mad.TASKS:
    run = configs_mad.run(name)
    decodes = run.block.readout == 'auto_encoder'
    assert decodes == (name == 'compression')
    assert (run.task != run.test_task) == name.endswith('recall')


def test_an_unknown_task_is_refused():
  with pytest.raises(ValueError, match="got 'sums'"):
    configs_mad.run('sums')
