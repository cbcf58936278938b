"""Events as lines, bars and results."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import pytest

from fluxsplit.progress import Bars, Progress, Task, bytes_text, draws_bars, duration_text


def shown(events: list[dict[str, Any]], **options: bool) -> tuple[Progress, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with Progress(out=out, err=err, **options) as progress:
        for event in events:
            progress.show(event)
    return progress, out.getvalue(), err.getvalue()


RESULT = {"event": "result", "path": "a.pt", "recipe": {"seed": 7}}


def test_results_go_to_stdout_one_a_line() -> None:
    progress, out, err = shown([RESULT, RESULT | {"path": "b c.pt"}])
    assert out == "a.pt\nb c.pt\n"
    assert err == ""
    assert progress.results == ["a.pt", "b c.pt"]


def test_json_lines() -> None:
    _, out, _ = shown([RESULT], json_lines=True)
    assert json.loads(out) == {"path": "a.pt", "recipe": {"seed": 7}}


def test_failures_are_counted_and_said_even_when_quiet() -> None:
    progress, out, err = shown(
        [{"event": "failed", "item": "a\x1b[2J.pt", "message": "holds NaN", "hint": "sample it again"}], quiet=True
    )
    assert progress.failures == 1
    assert (out, err) == ("", "fluxsplit: a\\x1b[2J.pt: holds NaN; sample it again\n")


def test_a_name_is_said_once() -> None:
    for message, told in (("a.pt is refused", "/x/a.pt is refused"), ("a.pt: broken", "/x/a.pt: broken")):
        failed = {"event": "failed", "item": "/x/a.pt", "message": message, "hint": ""}
        assert shown([failed])[2] == f"fluxsplit: {told}\n"
        _, out, _ = shown([failed], json_lines=True)
        assert json.loads(out) == {"failed": "/x/a.pt", "message": message, "hint": ""}


def test_where_it_failed_is_told_who_asks() -> None:
    event = {"event": "failed", "item": "a.pt", "message": "broken", "traceback": "Traceback:\n  line 7"}
    assert shown([event])[2] == "fluxsplit: a.pt: broken\n"
    assert shown([event], debug=True)[2] == "fluxsplit: a.pt: broken\nTraceback:\n  line 7\n"


@pytest.mark.parametrize("named", ["a.pt", "in/a.pt", "/models/in/a.pt"])
def test_a_name_is_told_once_and_in_full(named: str) -> None:
    event = {"event": "failed", "item": "/models/in/a.pt", "message": f"{named} does not exist"}
    assert shown([event])[2] == "fluxsplit: /models/in/a.pt does not exist\n"


def test_what_failed_is_not_counted_as_done() -> None:
    _, _, err = shown([{"event": "decode", "done": 3, "total": 3, "failed": 2}])
    assert err == "fluxsplit: latents decoded: 1 of 3\n"


def test_quiet_says_nothing_else() -> None:
    _, _, err = shown(
        [{"event": "note", "text": "hello"}, {"event": "text", "done": 1, "total": 1}, {"event": "ready"}], quiet=True
    )
    assert err == ""


def test_without_a_terminal_a_line_for_what_is_finished() -> None:
    gigabyte = 1_000_000_000
    events: list[dict[str, Any]] = [
        {"event": "note", "text": "no model given: using the demo model"},
        *(
            {"event": "load", "what": "transformer", "done_bytes": n * gigabyte, "total_bytes": 12 * gigabyte}
            for n in range(13)
        ),
        {"event": "text", "done": 1, "total": 2},
        {"event": "text", "done": 2, "total": 2},
        *({"event": "step", "image": 0, "images": 2, "step": k, "steps": 4, "step_s": 1.5} for k in range(1, 5)),
        {"event": "unheard of"},
        {"event": "decode", "done": 1, "total": 1},
    ]
    _, _, err = shown(events)
    lines = err.splitlines()
    assert lines[0] == "fluxsplit: no model given: using the demo model"
    assert lines[1].startswith("fluxsplit: transformer: 12 GB read")
    assert lines[2:] == [
        "fluxsplit: text encoding: done",
        "fluxsplit: image 1 of 2: 4 steps, 1.5 s/step",
        "fluxsplit: latents decoded: 1 of 1",
    ]


def test_a_slow_task_says_so_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 6))
    monkeypatch.setattr("fluxsplit.progress.time.monotonic", lambda: next(now))
    _, _, err = shown(
        [{"event": "step", "image": 0, "images": 1, "step": k, "steps": 20, "step_s": 6.0} for k in range(1, 5)]
    )
    assert "fluxsplit: image: step 1 of 20, 6 s/step, 1:54 min left\n" in err


def test_what_is_finished_says_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 6))
    monkeypatch.setattr("fluxsplit.progress.time.monotonic", lambda: next(now))
    counted = {"image": 0, "images": 1, "total": 3}
    for kind, said in (
        ({"event": "decode"}, "latents decoded: 3 of 3"),
        ({"event": "upscale", **counted}, "picture enlarged: 3 tiles"),
    ):
        _, _, err = shown([kind | {"done": 0, "total": 3}, kind | {"done": 3, "total": 3}])
        assert err.splitlines()[-1].startswith(f"fluxsplit: {said} in ")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_bars_are_for_terminals() -> None:
    assert draws_bars(Terminal(), {"TERM": "xterm"})
    assert not draws_bars(Terminal(), {"TERM": "dumb"})
    assert not draws_bars(io.StringIO(), {"TERM": "xterm"})


@pytest.mark.parametrize("no_color", [True, False])
def test_bars_respect_no_color(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    bars = Bars(stream)
    bars.update(Task("step 0", "image [bold]", 1, 4, "step 1 of 4, 2 s/step, 6 s left"))
    bars.pause()
    bars.update(Task("step 0", "image [bold]", 4, 4, "step 4 of 4"))
    bars.close()
    text = stream.getvalue()
    assert "image [bold]" in text and "6 s left" in text
    assert ("\x1b[38;5;" in text) is not no_color


def test_a_result_is_not_drawn_over() -> None:
    out, err = io.StringIO(), Terminal()
    os.environ.setdefault("TERM", "xterm")
    with Progress(out=out, err=err) as progress:
        progress.show({"event": "decode", "done": 1, "total": 2})
        progress.show(RESULT)
        progress.show({"event": "decode", "done": 2, "total": 2})
    assert out.getvalue() == "a.pt\n"
    assert "latents decoded: 2 of 2" in err.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (11_900_000_000, "11.9 GB"), (2.5e12, "2.5 TB"), (83_819, "83.8 kB")],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (185, "3:05 min"), (3723, "1:02:03 h")])
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_program_that_started_us_gets_every_task_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUXSPLIT_PROGRESS", "json")
    err = io.StringIO()
    with Progress(err=err) as progress:
        progress.show({"event": "decode", "done": 1, "total": 2})
    task = json.loads(err.getvalue())["progress"]
    assert task["title"] == "latents decoded" and (task["done"], task["total"]) == (1, 2)
