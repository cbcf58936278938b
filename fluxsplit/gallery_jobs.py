"""Renders of the picked previews: what they will take, and `fluxsplit rerender` run one after the other.

Each run is a process of its own, as on the command line, so that the gallery holds no model and loses nothing
when a render dies. Nothing that the page sends reaches the command line but numbers and words of fixed lists.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fluxsplit.child_environment import child_environment, module_command, own_process_group
from fluxsplit.errors import UsageError
from fluxsplit.gallery_index import Picture
from fluxsplit.progress import FORMAT_VARIABLE
from fluxsplit.recipe import VAE_FACTOR, check_size
from fluxsplit.step_times import step_seconds

MAX_WAITING = 8
MAX_FINISHED = 20
MAX_LINE_BYTES = 4 << 20
LAST_LINES = 20
CANCEL_WAIT_S = 10.0
KEEPS = ("seed", "noise", "image", "composition")
UPSCALES = (2, 4)
_SIZE = re.compile(r"\d{2,5}x\d{2,5}", re.ASCII)


@dataclass(frozen=True, slots=True)
class RenderSettings:
    """How the picks are to be rendered; None is rerender's default."""

    size: str | None = None
    """`1152x944`; either this or `scale`."""
    scale: float | None = None
    keep: str | None = None
    upscale: int | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.scale is None):
            raise UsageError("give a size or a scale, and not both")
        if self.size is not None:
            if not isinstance(self.size, str) or not _SIZE.fullmatch(self.size):
                raise UsageError(f"size {str(self.size)[:40]!r} is not like 1152x944")
            check_size(*map(int, self.size.split("x")))
        if self.scale is not None and (type(self.scale) not in (int, float) or not 0.25 <= self.scale <= 8):
            raise UsageError(f"scale {str(self.scale)[:40]!r} is not a number from 0.25 to 8")
        if self.keep is not None and self.keep not in KEEPS:
            raise UsageError(f"keep {str(self.keep)[:40]!r} is not one of {', '.join(KEEPS)}")
        if self.upscale is not None and (type(self.upscale) is not int or self.upscale not in UPSCALES):
            raise UsageError(f"upscale {str(self.upscale)[:40]!r} is not one of {', '.join(map(str, UPSCALES))}")

    def pixels(self, picture: Picture) -> tuple[int, int]:
        """Width and height in which a preview will be sampled."""
        if self.size is not None:
            width, height = map(int, self.size.split("x"))
            return width, height
        scale = self.scale or 1
        return _to_grid(picture.width * scale), _to_grid(picture.height * scale)


def settings_from_object(value: Any) -> RenderSettings:
    """The settings in a JSON object of the page; raises UsageError."""
    names = {"size", "scale", "keep", "upscale"}
    if not isinstance(value, dict) or set(value) - names:
        raise UsageError(f"render settings are an object of {', '.join(sorted(names))}")
    return RenderSettings(**value)


def rerender_words(settings: RenderSettings, folder: Path, renders: Path, more: Sequence[str] = ()) -> list[str]:
    """The arguments of `fluxsplit` that render a folder's picks; `more` are the person's own flags for rerender."""
    words = ["rerender", "--from-picks", str(folder)]
    words += ["--size", settings.size] if settings.size is not None else ["--scale", f"{settings.scale:g}"]
    words += ["--keep", settings.keep] if settings.keep is not None else []
    words += ["--upscale", str(settings.upscale)] if settings.upscale is not None else []
    return [*words, "--out", str(renders), *more]


def shown_command(words: Sequence[str]) -> str:
    """The command as a person would type it."""
    every = ["fluxsplit", *words]
    return subprocess.list2cmdline(every) if os.name == "nt" else shlex.join(every)


def plan(settings: RenderSettings, picked: Sequence[Picture]) -> dict[str, Any]:
    """What rendering the picks will take: how many, in which sizes, and seconds where steps were timed here.

    `known` is of how many pictures the time could be foretold; without text encoding, loading and decoding.
    """
    sizes = sorted({"x".join(map(str, settings.pixels(picture))) for picture in picked})
    times = [_foretold(settings, picture) for picture in picked]
    known = [seconds for seconds in times if seconds is not None]
    average_s = sum(known) / len(known) if known else None
    total_s = None if average_s is None else average_s * len(picked)
    return {"count": len(picked), "sizes": sizes[:4], "seconds": total_s, "known": len(known)}


def _foretold(settings: RenderSettings, picture: Picture) -> float | None:
    width, height = settings.pixels(picture)
    step_s = step_seconds(picture.model, width, height) if picture.steps else None
    return None if step_s is None or picture.steps is None else step_s * picture.steps


def _to_grid(pixels: float) -> int:
    return max(16, round(pixels / VAE_FACTOR) * VAE_FACTOR)


@dataclass(slots=True)
class _Run:
    id: int
    words: list[str]
    count: int
    state: str = "waiting"
    """waiting, running, done, failed or cancelled."""
    task: dict[str, Any] | None = None
    results: list[str] = field(default_factory=list)
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    process: subprocess.Popen[bytes] | None = None


class RenderQueue:
    """Runs renders one after the other; `state` is what the page shows of them."""

    def __init__(self, command: Callable[[list[str]], list[str]] | None = None) -> None:
        self._command = command or (lambda words: module_command("fluxsplit", *words, "--json"))
        self._runs: dict[int, _Run] = {}
        self._ids = itertools.count(1)
        self._change = threading.Condition()
        self._closed = False
        self.revision = 0
        self._worker: threading.Thread | None = None

    def submit(self, words: list[str], count: int) -> int:
        """Queue a render of `count` pictures; returns its id, or raises UsageError where the queue is full."""
        with self._change:
            waiting = sum(run.state == "waiting" for run in self._runs.values())
            if waiting >= MAX_WAITING:
                raise UsageError(f"{waiting} renders are waiting already", "wait for one to end, or cancel some")
            run = _Run(next(self._ids), words, count)
            self._runs[run.id] = run
            ended = [id for id, old in self._runs.items() if old.state in ("done", "failed", "cancelled")]
            for id in ended[:-MAX_FINISHED]:
                del self._runs[id]
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()
            self._changed()
            return run.id

    def cancel(self, id: int) -> None:
        """Take a render out of the queue, or end its process; raises UsageError where there is none to cancel."""
        with self._change:
            run = self._runs.get(id)
            if run is None or run.state not in ("waiting", "running"):
                raise UsageError("that render is not running any more")
            run.state = "cancelled"
            process = run.process
            self._changed()
        if process is not None:
            threading.Thread(target=_end, args=(process,), daemon=True).start()

    def close(self) -> None:
        """Cancel everything and wait until no process is left."""
        with self._change:
            self._closed = True
            runs = [run for run in self._runs.values() if run.state in ("waiting", "running")]
            for run in runs:
                run.state = "cancelled"
            self._change.notify_all()
        for run in runs:
            if run.process is not None:
                _end(run.process)
        if self._worker is not None:
            self._worker.join(CANCEL_WAIT_S)

    def state(self) -> list[dict[str, Any]]:
        """Every render: id, state, count, results so far, the task at hand, the last line, the command."""
        with self._change:
            return [
                {
                    "id": run.id,
                    "state": run.state,
                    "count": run.count,
                    "results": len(run.results),
                    "task": run.task,
                    "line": run.lines[-1] if run.lines else "",
                    "command": shown_command(run.words),
                }
                for run in self._runs.values()
            ]

    def _changed(self) -> None:
        self.revision += 1
        self._change.notify_all()

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._closed and not any(run.state == "waiting" for run in self._runs.values()):
                    self._change.wait()
                if self._closed:
                    return
                run = next(run for run in self._runs.values() if run.state == "waiting")
                run.state = "running"
                self._changed()
            self._run(run)

    def _run(self, run: _Run) -> None:
        try:
            process = _started(self._command(run.words))
        except OSError as error:
            self._ended(run, f"cannot start: {error.strerror}", failed=True)
            return
        with self._change:
            run.process = process
            cancelled = run.state == "cancelled"
        if cancelled:
            _end(process)
        reader = threading.Thread(target=self._read_stderr, args=(run, process.stderr), daemon=True)
        reader.start()
        for line in _lines(process.stdout):
            self._heard(run, line, on_stdout=True)
        code = process.wait()
        reader.join(1.0)
        for stream in (process.stdout, process.stderr):
            if stream is not None and not reader.is_alive():
                stream.close()
        self._ended(run, "", failed=code != 0)

    def _ended(self, run: _Run, line: str, failed: bool) -> None:
        with self._change:
            if line:
                run.lines.append(line)
            if run.state == "running":
                run.state = "failed" if failed else "done"
            run.task, run.process = None, None
            self._changed()

    def _read_stderr(self, run: _Run, stream: IO[bytes] | None) -> None:
        for line in _lines(stream):
            self._heard(run, line, on_stdout=False)

    def _heard(self, run: _Run, line: bytes, on_stdout: bool) -> None:
        """Take in a line: a result on stdout, progress or words for people on stderr."""
        value: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
        with self._change:
            if on_stdout and isinstance(value, dict) and isinstance(value.get("path"), str):
                if value.get("source") not in run.results:  # what was enlarged is no second picture
                    run.results.append(value["path"])
            elif isinstance(value, dict) and isinstance(value.get("progress"), dict):
                run.task = _task(value["progress"])
            elif not on_stdout and (text := line.decode("utf-8", "replace").strip()):
                run.lines.append(text.removeprefix("fluxsplit: ")[:500])
            self._changed()


def _task(value: dict[str, Any]) -> dict[str, Any]:
    """Title, detail and share of the task at hand."""
    share = 0.0
    with contextlib.suppress(TypeError, ValueError, ZeroDivisionError, OverflowError):
        share = min(1.0, max(0.0, float(value["done"]) / float(value["total"])))
    return {"title": str(value.get("title", ""))[:200], "detail": str(value.get("detail", ""))[:200], "share": share}


def _lines(stream: IO[bytes] | None) -> Iterable[bytes]:
    with contextlib.suppress(OSError, ValueError):
        while stream is not None and (line := stream.readline(MAX_LINE_BYTES)):
            yield line


def _started(command: list[str]) -> subprocess.Popen[bytes]:
    environment = child_environment(os.environ) | {FORMAT_VARIABLE: "json"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment, **own_process_group()
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the render as Ctrl-C does, so that it ends its stages; after some seconds kill it and them."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            process.send_signal(signal.CTRL_BREAK_EVENT)  # to terminate is to kill there
        else:
            process.terminate()
    try:
        process.wait(CANCEL_WAIT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
