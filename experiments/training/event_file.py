"""Writes scalars for TensorBoard, each on disk when the call returns.

tensorboardX's SummaryWriter hands events to a thread and loses the last ones
when the process is killed; its file format underneath does not need one.
"""

from collections.abc import Mapping
import pathlib
import time

from tensorboardX import event_file_writer
from tensorboardX import summary
from tensorboardX.proto import event_pb2


class EventFile:
  """One event file, the last of its directory in the order of their names.

  Args:
    directory: made if it is missing.
    purge_step: TensorBoard drops the points of earlier files from this step on;
      None: none.
  """

  def __init__(self, directory: pathlib.Path, *, purge_step: int | None = None):
    directory.mkdir(parents=True, exist_ok=True)
    # Names hold the time in seconds: two files of one second need a suffix.
    number = sum(1 for _ in directory.iterdir())
    self._writer = event_file_writer.EventsWriter(
      str(directory / 'events'), f'.{number:06}'
    )
    if purge_step is not None:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._writer.write_event(
        event_pb2.Event(step=purge_step, session_log=start)
      )
    self._writer.flush()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one point for each tag."""
    for tag, value in values.items():
      self._writer.write_event(
        event_pb2.Event(
          wall_time=time.time(),
          step=step,
          summary=summary.scalar(tag, float(value)),
        )
      )
    self._writer.flush()

  def close(self) -> None:
    """Closes the file."""
    self._writer.close()
