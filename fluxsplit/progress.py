"""Events drawn as bars or one-line notes on stderr, result paths printed on stdout.

Bars are drawn only where stderr is a terminal; elsewhere a line now and then says how far things are. rich
is imported when the first bar is drawn, so that commands without one start quickly.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol, TextIO

NOTE_EVERY_S = 10.0
ROOM_COLUMNS = 3
"""Left free beside the bars, for the `^C` of a terminal, which would wrap to a line that nobody wipes."""
FORMAT_VARIABLE = "FLUXSPLIT_PROGRESS"


@dataclass(frozen=True, slots=True)
class Task:
    """How far one thing is: `done` of `total`, what it is and the figures beside the bar."""

    key: str
    title: str
    done: float
    total: float
    detail: str

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.done >= self.total


class Display(Protocol):
    """Where tasks and lines for people are shown."""

    def update(self, task: Task) -> None:
        """Show how far a task is."""

    def pause(self) -> None:
        """Make room for a line that is printed elsewhere."""

    def close(self) -> None:
        """Stop drawing."""


class Progress:
    """Shows the events of the stages; counts what was made and what failed."""

    def __init__(
        self,
        json_lines: bool = False,
        quiet: bool = False,
        out: TextIO | None = None,
        err: TextIO | None = None,
        debug: bool = False,
    ) -> None:
        """With `debug` what failed is followed by where."""
        self._json_lines = json_lines
        self._debug = debug
        self._quiet = quiet
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._started_s: dict[str, float] = {}
        self._display: Display | None = None
        self.results: list[str] = []
        self.failures = 0

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event; those that are unknown show nothing, so that stages may say more in time."""
        kind = event["event"]
        if kind == "result":
            self._result(event)
        elif kind == "planned":
            self._planned(event)
        elif kind == "failed":
            self.failed(str(event.get("item", "")), str(event.get("message", "")), str(event.get("hint", "")))
            for line in str(event.get("traceback", "")).splitlines() if self._debug else ():
                self._line(line)
        elif kind == "note":
            self.note(str(event.get("text", "")))
        elif kind in _TASKS and not self._quiet:
            key = _key(event)
            started_s = self._started_s.setdefault(key, time.monotonic())
            self._shown().update(_TASKS[kind](key, event, time.monotonic() - started_s))

    def note(self, text: str) -> None:
        """A line for the person, unless quiet."""
        if not self._quiet:
            self._line(f"fluxsplit: {text}")

    def failed(self, item: str, message: str, hint: str) -> None:
        """One item failed and the rest go on; said even when quiet, and to programs as a line of JSON too."""
        self.failures += 1
        if self._json_lines:
            self._answer(json.dumps({"failed": item, "message": message, "hint": hint}))
        parts = item.replace("\\", "/").split("/")
        ends = ("/".join(parts[at:]) for at in range(len(parts)))
        named = next((end for end in ends if end and message.startswith(end)), "")
        if named:  # the longer name says more
            told = item + message[len(named) :]
        else:
            told = message if not item or item in message else f"{item}: {message}"
        self._line(f"fluxsplit: {told}; {hint}" if hint else f"fluxsplit: {told}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            self._display.close()

    def _shown(self) -> Display:
        if self._display is None:
            self._display = _display(self._err, os.environ)
        return self._display

    def _line(self, text: str) -> None:
        if self._display is not None:
            self._display.pause()
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), file=self._err, flush=True)

    def _result(self, event: Mapping[str, Any]) -> None:
        path = str(event["path"])
        self.results.append(path)
        told = {name: event[name] for name in ("path", "source", "width", "height") if name in event}
        self._answer(json.dumps(told | {"recipe": event.get("recipe")}) if self._json_lines else path)

    def _planned(self, event: Mapping[str, Any]) -> None:
        """What would be made of a file."""
        told = {name: event[name] for name in ("source", "path", "taken", "width", "height", "device", "plan")}
        size, taken = f"{told['width']}x{told['height']}", " (the name is taken)" if told["taken"] else ""
        line = f"{told['source']} to {told['path']}{taken}: {size} on {told['device']}, {told['plan']}"
        self._answer(json.dumps(told) if self._json_lines else line)

    def _answer(self, line: str) -> None:
        """A line on stdout."""
        if self._display is not None:
            self._display.pause()
        print(line, file=self._out, flush=True)


def draws_bars(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether bars can be drawn on `stream`: a terminal that can move its cursor."""
    return stream.isatty() and environment.get("TERM") != "dumb"


def _display(stream: TextIO, environment: Mapping[str, str]) -> Display:
    if environment.get(FORMAT_VARIABLE) == "json":
        return JsonLines(stream)
    return Bars(stream) if draws_bars(stream, environment) else Lines(stream)


class JsonLines:
    """Progress for a program that started this one (`FLUXSPLIT_PROGRESS=json`): every task as one JSON line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def update(self, task: Task) -> None:
        """A line with all fields of the task."""
        print(json.dumps({"progress": asdict(task)}), file=self._stream, flush=True)

    def pause(self) -> None:
        """Lines need no room made."""

    def close(self) -> None:
        """Lines need no end."""


class Lines:
    """Progress for logs: a line when something is finished, and one every few seconds in between."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last_s = time.monotonic()
        self._finished: set[tuple[str, str]] = set()

    def update(self, task: Task) -> None:
        """A line, unless one was printed a moment ago."""
        mark = (task.key, task.title)
        now_s = time.monotonic()
        if mark in self._finished or (not task.finished and now_s - self._last_s < NOTE_EVERY_S):
            return
        if task.finished:
            self._finished.add(mark)
        self._last_s = now_s
        print(f"fluxsplit: {task.title}: {task.detail}", file=self._stream, flush=True)

    def pause(self) -> None:
        """Lines need no room made."""

    def close(self) -> None:
        """Lines need no end."""


class Bars:
    """Progress for a terminal: one bar for each task that is not finished yet."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415  where a bar is drawn, not at start
        from rich.progress import BarColumn, TextColumn  # noqa: PLC0415
        from rich.progress import Progress as RichProgress  # noqa: PLC0415

        self._tasks: dict[str, Any] = {}
        console = Console(file=stream)
        console.width = max(20, console.width - ROOM_COLUMNS)
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def update(self, task: Task) -> None:
        """Draw the task's bar, or move it."""
        self._bars.start()
        if task.key not in self._tasks:
            self._tasks[task.key] = self._bars.add_task(task.title, total=task.total, detail=task.detail)
        bar = self._tasks[task.key]
        self._bars.update(bar, completed=task.done, total=task.total, description=task.title, detail=task.detail)
        if task.finished:
            self._bars.remove_task(self._tasks.pop(task.key))
            self._bars.console.print(f"{task.title}: {task.detail}", markup=False, highlight=False)

    def pause(self) -> None:
        """Take the bars off the screen; the next update draws them again."""
        self._bars.stop()

    def close(self) -> None:
        """Take the bars off the screen."""
        self._bars.stop()


def _key(event: Mapping[str, Any]) -> str:
    part = {"load": "what", "upscale": "image"}.get(event["event"])
    return f"{event['event']} {event.get(part, '')}" if part else str(event["event"])


def _load(key: str, event: Mapping[str, Any], elapsed_s: float) -> Task:
    done, total = int(event["done_bytes"]), int(event["total_bytes"])
    rate = f", {bytes_text(done / elapsed_s)}/s" if elapsed_s > 0.05 and done else ""
    amount = bytes_text(total) if done >= total else f"{bytes_text(done)} of {bytes_text(total)}"
    return Task(key, str(event["what"]), done, total, f"{amount} read{rate}")


def _text(key: str, event: Mapping[str, Any], elapsed_s: float) -> Task:
    """Every prompt goes through two encoders, so that the count is of passes; a share says it better."""
    done, total = int(event["done"]), int(event["total"])
    share = f"{100 * done // max(1, total)} %" if done < total else "done"
    return Task(key, "text encoding", done, total, f"{share}{_time(done, total, elapsed_s)}")


def _vae(key: str, event: Mapping[str, Any], elapsed_s: float) -> Task:
    """`done` may be fractional: how far a large picture is. Those that `failed` are among them."""
    done, total, failed = float(event["done"]), int(event["total"]), int(event.get("failed", 0))
    part = f", {100 * (done % 1):.0f} % of the next" if done % 1 else ""
    title = "latents decoded" if key == "decode" else "pictures encoded"
    return Task(key, title, done, total, f"{int(done) - failed} of {total}{part}{_time(done, total, elapsed_s)}")


def _upscale(key: str, event: Mapping[str, Any], elapsed_s: float) -> Task:
    """Tiles of picture `image`; the time left is that of this picture."""
    image, images = int(event["image"]), int(event["images"])
    done, total = int(event["done"]), int(event["total"])
    title = f"picture {image + 1} of {images} enlarged" if images > 1 else "picture enlarged"
    detail = f"tile {done} of {total}" if done < total else f"{total} tiles"
    return Task(key, title, done, total, f"{detail if total > 1 else 'one piece'}{_time(done, total, elapsed_s)}")


def _time(done: float, total: float, elapsed_s: float) -> str:
    """How long it will take yet, or has taken; nothing where that cannot be told or is next to nothing."""
    if elapsed_s < 1 or done <= 0:
        return ""
    if done >= total:
        return f" in {duration_text(elapsed_s)}"
    return f", {duration_text(elapsed_s / done * (total - done))} left"


def _step(key: str, event: Mapping[str, Any], elapsed_s: float) -> Task:
    """`step` counts the finished steps of the `together` images from `image` on; earlier ones are finished."""
    image, images, together = int(event["image"]), int(event["images"]), int(event.get("together", 1))
    step, steps, step_s = int(event["step"]), int(event["steps"]), float(event["step_s"])
    to_do = steps - step + steps // max(1, together) * max(0, images - image - together)
    which = f"image {image + 1}" if together <= 1 else f"images {image + 1} to {image + together}"
    title = f"{which} of {images}" if images > 1 else "image"
    done = f"step {step} of {steps}" if step < steps else f"{steps} step{'s' * (steps > 1)}"
    left = f", {duration_text(to_do * step_s)} left" if step < steps and step_s > 0 else ""
    return Task(f"{key} {image}", title, step, steps, f"{done}, {step_s:.3g} s/step{left}")


_TASKS: dict[str, Callable[[str, Mapping[str, Any], float], Task]] = {
    "load": _load,
    "text": _text,
    "step": _step,
    "decode": _vae,
    "encode": _vae,
    "upscale": _upscale,
}


def bytes_text(count: float) -> str:
    """A byte count for people, in decimal units as disks and downloads are sold: `11.9 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration_text(seconds: float) -> str:
    """A duration for people: `12 s`, `3:05 min`, `1:02:03 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
