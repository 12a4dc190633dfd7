"""The end of a process that the same command, started again, can mend."""

import os
import sys
import threading
from typing import NoReturn

# EX_TEMPFAIL of sysexits.h.
EXIT_CODE = 75

_once = threading.Lock()


def end(reason: str) -> NoReturn:
  """Says why in one line and ends the process at once, from any thread.

  Neither waits for other threads nor for other processes, which may hang.

  Args:
    reason: what happened, and where there is more to read.
  """
  with _once:  # Held to the end: whoever comes second says nothing.
    line = f'error: {reason}; exit {EXIT_CODE}: the same command resumes\n'
    try:
      os.write(sys.stderr.fileno(), line.encode())
    finally:
      os._exit(EXIT_CODE)
