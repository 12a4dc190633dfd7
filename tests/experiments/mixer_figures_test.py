import pytest

from experiments import mixer_figures

ROW = {
  'mixer': 'gla',
  'device': 'cpu',
  'trained_tokens_per_s': 2.0,
  'decoded_tokens_per_s': 3.0,
  'state_bytes': 4,
  'sizes': {
    'num_layers': 1,
    'model_width': 8,
    'batch': 1,
    'length': 2,
    'dtype': 'float32',
  },
}


def test_a_figure_is_drawn(tmp_path):
  path = tmp_path / 'mixers.png'
  mixer_figures.draw_mixers([ROW, ROW | {'mixer': 'mamba'}], path)
  assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('rows', [[], [ROW, ROW | {'device': 'gpu'}]])
def test_rows_must_be_of_one_device(tmp_path, rows):
  with pytest.raises(ValueError, match='must be of one device'):
    mixer_figures.draw_mixers(rows, tmp_path / 'x.png')
