"""What a stage process says to its parent: JSON lines on a descriptor of their own, and death when the parent dies."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
import time
import traceback
from typing import Any, TextIO

PARENT_POLL_S = 0.5


class Events:
    """Writes events as JSON lines; anything else that is printed goes to stderr."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self.results = 0
        self.failures = 0

    @staticmethod
    def claim_stdout() -> Events:
        """Take over stdout for events, so that no library's print can garble them."""
        stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        return Events(stream)

    def send(self, event: str, **fields: Any) -> None:
        """Write one event; results and failures are counted for the closing `done`.

        What failed by an error that is being handled is told with its traceback.
        """
        if event == "failed" and sys.exc_info()[0] is not None:
            fields["traceback"] = traceback.format_exc()
        self.results += event == "result"
        self.failures += event == "failed"
        with self._lock:
            self._stream.write(json.dumps({"event": event, **fields}) + "\n")
            self._stream.flush()

    def done(self) -> None:
        """The closing event of a stage that ran to its end."""
        self.send("done", results=self.results, failures=self.failures)


def read_job() -> str:
    """The job's line from stdin; from then on the process ends as soon as stdin closes, its parent being gone."""
    line = sys.stdin.readline()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    return line


def _die_with_parent() -> None:
    if sys.platform == "win32":
        # A read that waits locks the pipe there: a library that looks at stdin as it is loaded, as OpenBLAS does, would
        # wait for ever (numpy#24290). To ask whether anybody holds the other end locks nothing.
        import msvcrt  # noqa: PLC0415  of Windows alone

        pipe = ctypes.c_void_p(msvcrt.get_osfhandle(sys.stdin.fileno()))
        while ctypes.windll.kernel32.PeekNamedPipe(pipe, None, 0, None, None, None):
            time.sleep(PARENT_POLL_S)
    else:
        while sys.stdin.read(4096):
            continue
    os._exit(1)
