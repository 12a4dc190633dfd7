import time

from experiments.training import event_file


def test_two_files_of_one_second_are_two(tmp_path, monkeypatch):
  monkeypatch.setattr(time, 'time', lambda: 1_700_000_000.0)
  directory = tmp_path / 'events'
  sizes = []
  for step in range(2):
    file = event_file.EventFile(directory)
    file.write(step, {'loss': 1.0})
    # What was written is on disk before the file is closed.
    sizes.append(sum(path.stat().st_size for path in directory.iterdir()))
    file.close()
  assert len(list(directory.iterdir())) == 2
  assert sizes[1] > sizes[0] > 50
