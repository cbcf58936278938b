"""Files exist whole or not at all: faults, full disks, kills and races."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fluxsplit import durable
from fluxsplit.errors import FluxsplitError


def test_a_folder_is_tried_beforehand_and_nothing_is_left_there(tmp_path: Path) -> None:
    durable.check_folder(tmp_path / "new" / "deep")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FluxsplitError, match="cannot write"):
            durable.check_folder(place)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_links(*_: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_write_new_makes_folders_and_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.png"
    assert durable.write_new(path, [b"one", memoryview(b"two"), bytearray(b"")]) == path
    assert path.read_bytes() == b"onetwo"
    with pytest.raises(FluxsplitError, match="already exists"):
        durable.write_new(path, b"other")
    assert path.read_bytes() == b"onetwo"
    assert names(path.parent) == ["x.png"]


def test_replace_puts_the_new_file_in_place(tmp_path: Path) -> None:
    durable.replace(tmp_path / "x", b"old")
    durable.replace(str(tmp_path / "x"), b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("links", [True, False])
def test_free_names_are_counted_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    for data in (b"1", b"2", b"3"):
        durable.write_free(tmp_path, "fox.v1", ".pt", data)
    assert names(tmp_path) == ["fox.v1-2.pt", "fox.v1-3.pt", "fox.v1.pt"]
    assert (tmp_path / "fox.v1-3.pt").read_bytes() == b"3"


def test_a_dangling_link_counts_as_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FluxsplitError, match="already exists"):
        durable.write_new(tmp_path / "x", b"1")
    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FluxsplitError, match="already exists"):
        durable.write_new(tmp_path / "x", b"1")
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("links", [True, False])
def test_racing_writers_get_a_name_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    got: list[tuple[Path, bytes]] = []

    def work(writer: int) -> None:
        for number in range(10):
            data = f"{writer}.{number}".encode()
            got.append((durable.write_free(tmp_path, "x", ".pt", data), data))

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path for path, _ in got}) == 60
    assert all(path.read_bytes() == data for path, data in got)
    assert len(names(tmp_path)) == 60


def test_order_is_write_flush_name_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("write", "fsync", "link", "close"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real, **k: (order.append(name), real(*a, **k))[1])
    durable.write_new(tmp_path / "x", b"data")
    assert order == ["write", "fsync", "close", "link", "fsync", "close"]


@pytest.mark.parametrize("call", ["write", "fsync", "link", "open", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_refusing_system_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    calls: list[str] = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(call)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(FluxsplitError, match="cannot write") as caught:
            durable.write_free(tmp_path / "new", "x", ".pt", b"data")
    assert caught.value.hint and "\n" not in caught.value.line()
    assert len(calls) == 1, "a failed call is not repeated"
    assert not (tmp_path / "new").exists() or names(tmp_path / "new") == []


def test_what_is_there_already_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = durable.write_once(tmp_path, "a", ".png", b"same")
    before = first.stat()
    assert durable.write_once(tmp_path, "a", ".png", b"same") == first
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "reading is allowed"
    assert durable.write_once(tmp_path, "a", ".png", b"else").name == "a-2.png"
    flushed: list[Path] = []
    monkeypatch.setattr(durable, "_flush_file", flushed.append)
    assert durable.write_once(tmp_path, "a", ".png", b"else").name == "a-2.png", "whichever of its names it has"
    assert flushed == [tmp_path / "a-2.png"], "who wrote it may not have flushed it, and its latent may be deleted next"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a.png"]
    assert first.read_bytes() == b"same" and len(list(tmp_path.iterdir())) == 2


def test_full_disk_names_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FluxsplitError, match="the disk is full") as caught:
        durable.write_new(tmp_path / "x", bytes(1_500_000))
    assert "1.5 MB are needed" in caught.value.hint
    assert "free" in caught.value.hint


def test_failed_folder_flush_is_told_and_the_whole_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def fail_second(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    monkeypatch.setattr(os, "fsync", fail_second)
    with pytest.raises(FluxsplitError, match="Input/output error"):
        durable.write_new(tmp_path / "x", b"data")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"data"


def test_folders_without_flush_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fail_on_folder(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fail_on_folder)
    assert durable.write_new(tmp_path / "x", b"data").read_bytes() == b"data"


def test_an_interrupted_or_failing_source_leaves_nothing(tmp_path: Path) -> None:
    def chunks(error: BaseException) -> Any:
        yield b"some"
        raise error

    for error in (KeyboardInterrupt(), ValueError("x")):
        with pytest.raises(type(error)):
            durable.write_new(tmp_path / "x", chunks(error))
    assert names(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:3]))
    assert durable.write_new(tmp_path / "x", b"0123456789").read_bytes() == b"0123456789"


def test_odd_paths_are_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FluxsplitError, match="cannot write") as caught:
        durable.write_new(tmp_path / "file" / "x", b"")
    assert "is a file" in caught.value.hint
    with pytest.raises(FluxsplitError, match="over 255 bytes"):
        durable.write_new(tmp_path / ("ü" * 200), b"")
    assert durable.write_new(tmp_path / ("x" * 255), b"1").read_bytes() == b"1"
    assert durable.write_new(tmp_path / ("ü" * 127), b"1").read_bytes() == b"1"


def test_check_space_wants_twice_the_bytes(tmp_path: Path) -> None:
    durable.check_space(tmp_path / "not" / "yet", 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(FluxsplitError, match="the results need") as caught:
        durable.check_space(tmp_path, free)
    assert "choose another folder" in caught.value.hint


WRITER = """
import hashlib, os, sys
from fluxsplit import durable
while True:
    data = os.urandom(int(sys.argv[2]))
    stem = hashlib.sha256(data).hexdigest()
    print(durable.write_free(sys.argv[1], stem, ".bin", [data[:1000], data[1000:]]).name, flush=True)
"""


def kill_writers(folder: Path, kills: int, size_bytes: int) -> int:
    """Kill that many writers at random moments; returns how many files they finished."""
    finished = 0
    for _ in range(kills):
        command = [sys.executable, "-c", WRITER, str(folder), str(size_bytes)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = [process.stdout.readline().strip()]
            time.sleep(random.uniform(0, 0.03))
            process.send_signal(signal.SIGKILL)
            told += [line.strip() for line in process.stdout if line.endswith("\n")]
        final = [path for path in folder.iterdir() if not path.name.endswith(durable.PART_SUFFIX)]
        for path in final:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem, "a final name means a whole file"
        assert set(told) <= {path.name for path in final}, "what was told done is there"
        finished += len(final)
        for path in folder.iterdir():
            path.unlink()
    return finished


def test_killed_writers_leave_only_whole_files(tmp_path: Path) -> None:
    assert kill_writers(tmp_path, 6, 300_000) >= 6


@pytest.mark.torture
def test_500_killed_writers_leave_only_whole_files(tmp_path: Path) -> None:
    assert kill_writers(tmp_path, 500, 1_100_000) >= 500


ONE_FILE = """
import sys
from fluxsplit import durable
from fluxsplit.errors import FluxsplitError
try:
    durable.write_new(sys.argv[1] + "/x", bytes(2_000_000))
except FluxsplitError as error:
    print(error.line())
"""


def test_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ONE_FILE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)),
    )
    assert "allows no file of 2.0 MB" in done.stdout
    assert names(tmp_path) == []


def test_full_tmpfs_leaves_nothing(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=600k none "$1" || exit 77; "$2" -c "$3" "$1"; ls -A "$1"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), sys.executable, ONE_FILE]
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can mount")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (1, 77):
        pytest.skip("mounting is not allowed here")
    assert "the disk is full" in done.stdout
    assert done.stdout.count("\n") == 1, "one line of error, and an empty folder"
