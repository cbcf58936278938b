"""picks.jsonl: what is written comes back, torn ends and strangers' lines, writers at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fluxsplit import durable
from fluxsplit.errors import FluxsplitError
from fluxsplit.picks import MAX_FILE_BYTES, PICKS_NAME, Pick, add_pick, picked_names, read_picks

GOOD = '{"image": "0007.png", "pick": "pick", "stars": 3, "time": "2026-11-24T10:00:00+00:00"}'


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / PICKS_NAME
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_the_last_decision_wins_and_all_stay_in_the_file(tmp_path: Path) -> None:
    assert read_picks(tmp_path) == {}
    add_pick(tmp_path, Pick("0007.png", "pick", 3))
    add_pick(tmp_path, Pick("0008.png", "reject"))
    last = add_pick(tmp_path, Pick("0007.png", None, 5))
    picks = read_picks(tmp_path)
    assert picks["0007.png"] == last and last.time
    assert list(picks) == ["0008.png", "0007.png"] and picked_names(picks) == []
    lines = (tmp_path / PICKS_NAME).read_text().splitlines()
    assert [json.loads(line)["stars"] for line in lines] == [3, 0, 5]


def test_names_of_any_script_come_back(tmp_path: Path) -> None:
    for name in ("füchse 雪.png", "a b'\"&<>.png", "-rf.png", "x" * 251 + ".png"):
        add_pick(tmp_path, Pick(name, "pick"))
        assert name in read_picks(tmp_path)


@pytest.mark.parametrize("name", ["../x.png", "a/b.png", "a\\b.png", "C:x.png", "", ".", "..", "x\n.png", "é" * 200])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(FluxsplitError, match="name of a picture"):
        Pick(name)
    write(tmp_path, json.dumps({"image": name, "pick": None, "stars": 0, "time": ""}) + "\n")
    with pytest.raises(FluxsplitError, match="line 1"):
        read_picks(tmp_path)


@pytest.mark.parametrize("cut", range(1, len(GOOD)))
def test_a_torn_last_line_is_passed_over_then_cut_off(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, GOOD + "\n" + GOOD.replace("0007", "0008")[:cut])
    said: list[str] = []
    assert list(read_picks(tmp_path, said.append)) == ["0007.png"]
    assert len(said) == 1 and "half a line" in said[0]
    add_pick(tmp_path, Pick("0009.png", "pick"))
    assert list(read_picks(tmp_path, pytest.fail)) == ["0007.png", "0009.png"]
    assert len(path.read_text().splitlines()) == 2


def test_a_whole_line_without_its_newline_counts_and_is_kept(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert list(read_picks(tmp_path, pytest.fail)) == ["0007.png"]
    add_pick(tmp_path, Pick("0009.png"))
    assert list(read_picks(tmp_path, pytest.fail)) == ["0007.png", "0009.png"]


def test_without_a_listener_the_warning_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, '{"image')
    assert read_picks(tmp_path) == {}
    assert "half a line" in capsys.readouterr().err


HOSTILE = {
    "no JSON": "pick 0007.png",
    "no object": "[1]",
    "unknown field": GOOD[:-1] + ', "more": 1}',
    "missing field": '{"image": "0007.png"}',
    "twice": GOOD[:-1] + ', "stars": 1}',
    "six stars": GOOD.replace("3", "6", 1),
    "minus stars": GOOD.replace(": 3", ": -1"),
    "stars are true": GOOD.replace(": 3", ": true"),
    "half a star": GOOD.replace(": 3", ": 0.5"),
    "NaN": GOOD.replace(": 3", ": NaN"),
    "5000 digits": GOOD.replace(": 3", ": " + "9" * 1500),
    "other decision": GOOD.replace('"pick": "pick"', '"pick": "maybe"'),
    "decision is a list": GOOD.replace('"pick": "pick"', '"pick": []'),
    "image is a number": GOOD.replace('"0007.png"', "7"),
    "surrogate": GOOD.replace("0007", "\\ud800"),
    "deep": "[" * 2000,
    "long": GOOD.replace("0007", "0" * 3000),
    "time is a list": GOOD.replace('"2026-11-24T10:00:00+00:00"', "[]"),
}


def test_a_line_by_hand_needs_no_stars_and_no_time(tmp_path: Path) -> None:
    write(tmp_path, '{"image": "0007.png", "pick": "pick"}\n')
    assert read_picks(tmp_path)["0007.png"].pick == "pick"


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_a_line_that_was_never_written_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    write(tmp_path, f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(FluxsplitError, match=r"picks\.jsonl line 2"):
        read_picks(tmp_path)


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, b"\xff\xfe\n")
    with pytest.raises(FluxsplitError, match="line 1"):
        read_picks(tmp_path)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with write(tmp_path, "").open("r+b") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(FluxsplitError, match="over"):
        read_picks(tmp_path)
    with pytest.raises(FluxsplitError):
        add_pick(tmp_path, Pick("x.png"))


def test_links_and_pipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / PICKS_NAME).symlink_to(tmp_path / "elsewhere")
    for work in (lambda: read_picks(tmp_path), lambda: add_pick(tmp_path, Pick("x.png"))):
        with pytest.raises(FluxsplitError):
            work()
    assert (tmp_path / "elsewhere").read_text() == "precious"
    (tmp_path / PICKS_NAME).unlink()
    os.mkfifo(tmp_path / PICKS_NAME)
    for work in (lambda: read_picks(tmp_path), lambda: add_pick(tmp_path, Pick("x.png"))):
        with pytest.raises(FluxsplitError):
            work()


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_pick(tmp_path, Pick("0007.png"))
    before = (tmp_path / PICKS_NAME).read_bytes()
    real = os.write

    def full(handle: int, data: bytes) -> int:
        real(handle, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "write", full)
    with pytest.raises(FluxsplitError, match="disk is full"):
        add_pick(tmp_path, Pick("0008.png"))
    assert (tmp_path / PICKS_NAME).read_bytes() == before


WRITER = """
import sys
from fluxsplit.picks import Pick, add_pick
for number in range(int(sys.argv[2])):
    add_pick(sys.argv[1], Pick(f"{sys.argv[3]}-{number:05}.png", "pick"))
    print(number, flush=True)
"""


def writer(folder: Path, count: int, name: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", WRITER, str(folder), str(count), name]
    environment = {**os.environ, "PYTHONPATH": str(Path(durable.__file__).parents[1])}
    return subprocess.Popen(words, stdout=subprocess.PIPE, env=environment)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    writers = [writer(tmp_path, 100, name) for name in ("a", "b")]
    for process in writers:
        process.communicate()
        assert process.returncode == 0
    assert len(read_picks(tmp_path, pytest.fail)) == 200


def test_killed_writers_lose_nothing_that_they_reported(tmp_path: Path) -> None:
    for round_number in range(5):
        writers = [writer(tmp_path, 100_000, f"{round_number}{name}") for name in ("a", "b")]
        time.sleep(0.4)
        for process in writers:
            process.send_signal(signal.SIGKILL)
        reported = [process.communicate()[0].split() for process in writers]
        picks = read_picks(tmp_path, lambda _: None)
        for name, done in zip("ab", reported, strict=True):
            for number in done:
                assert f"{round_number}{name}-{int(number):05}.png" in picks
