"""What a stage process says to its parent: JSON lines on a descriptor of their own, and death when the parent dies."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any, TextIO


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
        """Write one event; results and failures are counted for the closing `done`."""
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
    while sys.stdin.read(4096):
        continue
    os._exit(1)
