"""Runs a stage in a process of its own, so that all its memory is given back, and relays its events.

The job goes down the child's stdin as one line; stdin then stays open for as long as this process lives, and
a child that sees it close ends at once. The child leads a process group of its own: Ctrl-C reaches only this
process, which then ends the child, rather than both at once in no particular order.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Any

from fluxsplit.child_environment import child_environment, module_command, own_process_group
from fluxsplit.errors import ERRORS_BY_EXIT_CODE, FluxsplitError, OutOfMemory, memory_hint
from fluxsplit.jobs import Job, job_to_json

MAX_EVENT_BYTES = 4 * 1024 * 1024
MAX_WAITING_EVENTS = 1000
STDERR_LINES = 200
STDERR_LINE_BYTES = 4096
TERMINATE_WAIT_S = 5.0
EXIT_WAIT_S = 30.0
"""How long a stage that said `done` may take to hand its memory back."""
POLL_S = 0.2

_WINDOWS_STATUS = {
    0xC0000005: "an access violation",
    0xC0000017: "no memory",
    0xC000012D: "no memory",
    0xC0000409: "a failed check",
}


def stage_command(stage: str) -> list[str]:
    """The command line of a stage process."""
    return module_command("fluxsplit.stages", stage)


class StageProcess:
    """A stage in its own process, which may be started ahead of its turn so that its imports overlap.

    Use it as a context manager: leaving the block ends the process, whatever happened inside.
    """

    def __init__(
        self, stage: str, command: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.stage = stage
        self._stderr_lines: deque[str] = deque(maxlen=STDERR_LINES)
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING_EVENTS)
        self._closed = threading.Event()
        self._process = subprocess.Popen(
            list(command or stage_command(stage)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(os.environ, stage=stage) if environment is None else dict(environment),
            **own_process_group(),
        )
        self._readers = [
            threading.Thread(target=self._read_events, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def stderr_tail(self) -> str:
        """The last lines that the stage, or a library in it, wrote to stderr."""
        return "\n".join(list(self._stderr_lines))

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def submit(self, job: Job) -> None:
        """Hand the stage its job; a stage that died before is reported by `events`."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(job_to_json(job).encode() + b"\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """The stage's events up to and including `done`, after which the process has ended.

        Raises the error that the stage reports, or one that says how the process died.
        """
        while (line := self._next_line()) is not None:
            event = self._parse(line)
            if event is None:
                continue
            if event["event"] == "error":
                raise self._reported(event)
            if event["event"] == "done":
                self._wait_for_exit()
                yield event
                return
            yield event
        raise self._died()

    def close(self) -> None:
        """End the process if it still runs: stdin closed, then terminate, then after some seconds kill."""
        self._closed.set()
        try:
            self._end(TERMINATE_WAIT_S)
        finally:
            if self._process.poll() is None:  # a second Ctrl-C while waiting
                self._process.kill()
                self._process.wait()
            for reader in self._readers:
                reader.join(timeout=1)
            for stream in (self._process.stdout, self._process.stderr):
                if stream is not None and not any(reader.is_alive() for reader in self._readers):
                    stream.close()

    def __enter__(self) -> StageProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end(self, wait_s: float) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if self._process.poll() is not None:
            return
        with contextlib.suppress(OSError):  # Windows refuses where it is ending already
            self._process.terminate()
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_for_exit(self) -> None:
        """Wait until the driver and the kernel have every byte back; the next stage starts from there."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._end(TERMINATE_WAIT_S)

    def _read_events(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := stream.readline(MAX_EVENT_BYTES):
                self._put(line)
        self._put(None)

    def _put(self, line: bytes | None) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._lines.put(line, timeout=POLL_S)
                return

    def _read_stderr(self, stream: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := stream.readline(STDERR_LINE_BYTES):
                self._stderr_lines.append(line.decode("utf-8", "replace").rstrip())

    def _next_line(self) -> bytes | None:
        """The next line of stdout, None at its end; polls, because Windows cannot interrupt a blocking get.

        A process that ended while something it started still holds the pipe counts as ended too.
        """
        idle_after_exit = 0
        while True:
            try:
                return self._lines.get(timeout=POLL_S)
            except queue.Empty:
                idle_after_exit += self._process.poll() is not None
                if idle_after_exit > 5:
                    return None

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        """The event in a line; what is not one was printed by a library and is kept beside stderr."""
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                return event
        self._stderr_lines.append(line[:STDERR_LINE_BYTES].decode("utf-8", "replace").rstrip())
        return None

    def _reported(self, event: Mapping[str, Any]) -> FluxsplitError:
        kind = ERRORS_BY_EXIT_CODE.get(event.get("exit_code", 1), FluxsplitError)
        error = kind(str(event.get("message", "")), str(event.get("hint", "")))
        if trace := event.get("traceback"):
            error.add_note(f"In the {self.stage} stage:\n{trace}")
        return error

    def _died(self) -> FluxsplitError:
        """Why the process ended without `done` or `error`, by its return code and its last words."""
        try:
            code = self._process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._end(TERMINATE_WAIT_S)
            code = self._process.wait()
        self._readers[1].join(timeout=1)
        error = _death(self.stage, code, self.stderr_tail)
        if self.stderr_tail:
            error.add_note(f"Last lines of the {self.stage} stage:\n{self.stderr_tail}")
        return error


def run_stage(
    stage: str, job: Job, command: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run one stage from start to end, yielding its events; the process is gone when this returns or raises."""
    with StageProcess(stage, command, environment) as process:
        process.submit(job)
        yield from process.events()


def _death(stage: str, code: int, stderr: str) -> FluxsplitError:
    last_words = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
    said = f": {last_words[:300]}" if last_words else ""
    see = "run with --debug to see its last lines"
    if code in (-9, 128 + 9):
        message = f"the {stage} stage was killed, most likely by the system because memory ran out"
        return OutOfMemory(message, memory_hint(stage))
    windows = _WINDOWS_STATUS.get(code & 0xFFFFFFFF) if os.name == "nt" else None
    if windows == "no memory":
        return OutOfMemory(f"the {stage} stage ran out of memory", memory_hint(stage))
    if windows:
        return FluxsplitError(f"the {stage} stage crashed with {windows}{said}", see)
    if code == -getattr(signal, "SIGBUS", 7):
        return FluxsplitError(
            f"the {stage} stage could not read a file that it had mapped (SIGBUS){said}",
            "a weight file was changed or cut short while it was read, or its disk fails",
        )
    if code < 0:
        return FluxsplitError(f"the {stage} stage was ended by {_signal_name(-code)}{said}", see)
    return FluxsplitError(f"the {stage} stage ended with exit code {code} before it was done{said}", see)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
