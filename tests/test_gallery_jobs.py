"""What rendering the picks takes, and the runs: progress, results, failures, cancelling, the cap."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.gallery_index import Picture
from fluxsplit.gallery_jobs import (
    MAX_WAITING,
    RenderQueue,
    RenderSettings,
    plan,
    rerender_words,
    settings_from_object,
    shown_command,
)
from fluxsplit.picks import Pick, add_pick
from fluxsplit.step_times import timed

FAKE = str(Path(__file__).parent / "fake_rerender.py")


def wait_for(condition: Callable[[], Any]) -> None:
    end_s = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def queue() -> Iterator[RenderQueue]:
    queue = RenderQueue(lambda words: [sys.executable, FAKE, *words])
    yield queue
    queue.close()


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    for name in ("0001.png", "0002.png"):
        add_pick(tmp_path / "previews", Pick(name, "pick"))
    return rerender_words(RenderSettings(scale=2), tmp_path / "previews", tmp_path / "renders")


def picture(**changes: Any) -> Picture:
    values: dict[str, Any] = {"width": 512, "height": 512, "steps": 4, "model": "flux.safetensors"}
    return Picture("a", "0001.png", "preview", 1, 1, **(values | changes))


def test_the_command_is_what_a_person_would_type() -> None:
    settings = RenderSettings(size="1152x944", keep="composition", upscale=2)
    words = rerender_words(settings, Path("my previews"), Path("renders"), ("--model", "x.safetensors"))
    assert shown_command(words) == (
        "fluxsplit rerender --from-picks 'my previews' --size 1152x944 --keep composition --upscale 2 "
        "--out renders --model x.safetensors"
    )
    assert shlex.split(shown_command(words))[1:] == words


def test_sizes_by_scale_are_sizes_that_can_be_sampled() -> None:
    assert RenderSettings(scale=1.5).pixels(picture(width=500, height=333)) == (752, 496)
    assert RenderSettings(size="1152x944").pixels(picture()) == (1152, 944)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"scale": 2, "size": "512x512"},
        {"scale": 0.1},
        {"scale": True},
        {"scale": float("nan")},
        {"size": "512"},
        {"size": 512},
        {"size": "513x512"},
        {"size": "512x512\n"},
        {"size": "٥١٢x512"},
        {"scale": 2, "keep": []},
        {"scale": 2, "keep": "all"},
        {"scale": 2, "upscale": 3},
        {"scale": 2, "upscale": 2.0},
        {"scale": 2, "model": "x"},
    ],
)
def test_settings_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(FluxsplitError):
        settings_from_object(value)


def test_the_time_is_foretold_from_steps_that_were_timed_here() -> None:
    settings = RenderSettings(scale=2)
    assert plan(settings, [picture()])["seconds"] is None
    steps = [
        {"event": "step", "image": 0, "images": 2, "together": 2, "step": step, "steps": 4, "step_s": step_s}
        for step, step_s in ((1, 99.0), (2, 6.0), (3, 6.0))
    ]
    assert list(timed(iter(steps), "/models/flux.safetensors", [(1024, 1024)] * 2)) == steps
    told = plan(settings, [picture(), picture()])
    assert told == {"count": 2, "sizes": ["1024x1024"], "seconds": pytest.approx(2 * 4 * 3.0), "known": 2}
    larger = plan(RenderSettings(size="2048x1024"), [picture()])["seconds"]
    assert larger == pytest.approx(4 * 3.0 * (8192 + 512) / (4096 + 512))
    assert plan(settings, [picture(model="other.safetensors")])["seconds"] is None
    assert plan(settings, [picture(steps=None), picture()])["seconds"] == pytest.approx(24.0)


def test_what_is_enlarged_is_no_second_result() -> None:
    lines = [{"path": "a.png", "source": "a.pt"}, {"path": "a-2x.png", "source": "a.png"}]
    code = f"for line in {[json.dumps(line) for line in lines]!r}: print(line)"
    queue = RenderQueue(lambda words: [sys.executable, "-c", code])
    queue.submit([], 1)
    wait_for(lambda: queue.state()[0]["state"] == "done")
    assert (queue.state()[0]["state"], queue.state()[0]["results"]) == ("done", 1)
    queue.close()


def test_a_render_reports_its_progress_and_its_results(queue: RenderQueue, words: list[str], tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    queue.submit(words, 2)

    def done() -> bool:
        run = queue.state()[0]
        if run["task"]:
            seen.append((run["task"]["title"], run["task"]["share"]))
        return bool(run["state"] == "done")

    wait_for(done)
    assert queue.state()[0]["results"] == 2 and queue.state()[0]["task"] is None
    assert sorted(path.name for path in (tmp_path / "renders").iterdir()) == ["0001.png", "0002.png"]
    assert {title for title, _ in seen} & {"image 1 of 2", "image 2 of 2"}


def test_a_render_of_which_a_part_failed_says_so(queue: RenderQueue, words: list[str], tmp_path: Path) -> None:
    add_pick(tmp_path / "previews", Pick("0666.png", "pick"))
    queue.submit(words, 3)
    wait_for(lambda: queue.state()[0]["state"] == "failed")
    assert queue.state()[0]["results"] == 2 and queue.state()[0]["line"] == "0666.png: no luck"


def test_a_command_that_is_not_there_fails(words: list[str]) -> None:
    queue = RenderQueue(lambda _: ["/nowhere/python"])
    queue.submit(words, 1)
    wait_for(lambda: queue.state()[0]["state"] == "failed")
    assert "cannot start" in queue.state()[0]["line"]
    queue.close()


def test_cancelling_ends_the_process_and_what_waits(
    queue: RenderQueue, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "30")
    first, second = queue.submit(words, 2), queue.submit(words, 2)
    wait_for(lambda: queue._runs[first].process is not None)
    process = queue._runs[first].process
    assert process is not None
    queue.cancel(second)
    queue.cancel(first)
    wait_for(lambda: process.poll() is not None and queue._runs[first].process is None)
    assert [run["state"] for run in queue.state()] == ["cancelled", "cancelled"]
    with pytest.raises(UsageError, match="not running"):
        queue.cancel(first)


def test_closing_leaves_no_process(queue: RenderQueue, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "30")
    id = queue.submit(words, 2)
    wait_for(lambda: queue._runs[id].process is not None)
    process = queue._runs[id].process
    assert process is not None
    queue.close()
    assert process.poll() is not None


def test_the_queue_has_an_end(queue: RenderQueue, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "30")
    queue.submit(words, 2)
    wait_for(lambda: queue.state()[0]["state"] == "running")
    for _ in range(MAX_WAITING):
        queue.submit(words, 2)
    with pytest.raises(UsageError, match="waiting already"):
        queue.submit(words, 2)


def test_words_for_nobody_do_no_harm(words: list[str]) -> None:
    code = """import sys
print('[' * 99999)
print('{"path": 7}')
print('{"progress": {"done": "x", "total": 0}}', file=sys.stderr)
sys.stderr.buffer.write(bytes([255, 254, 10]))"""
    queue = RenderQueue(lambda _: [sys.executable, "-c", code])
    queue.submit(words, 1)
    wait_for(lambda: queue.state()[0]["state"] == "done")
    assert queue.state()[0]["results"] == 0
    queue.close()
