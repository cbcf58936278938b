"""Reads that go on by themselves: the file's bytes, whoever reads them, and an error where they cannot be had."""

from __future__ import annotations

import ctypes
import errno
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fluxsplit import background_reads
from fluxsplit.background_reads import Reads, ThreadReads, _LibraryReads, reads_by
from fluxsplit.errors import FluxsplitError
from fluxsplit.weights import WeightFile

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only there the C library is asked")
KINDS = pytest.mark.parametrize("kind", [ThreadReads, pytest.param(_LibraryReads, marks=LINUX)])


@pytest.fixture
def file(tmp_path: Path) -> WeightFile:
    path = tmp_path / "weights"
    path.write_bytes(random.Random(0).randbytes(3_000_001))
    return WeightFile(str(path))


@KINDS
def test_many_at_once_are_the_bytes_of_the_file(file: WeightFile, kind: type[Any]) -> None:
    reads: Reads = kind(3)
    lots, data = random.Random(1), Path(file.path).read_bytes()
    begun = []
    for _ in range(200):
        start = lots.randrange(len(data) - 1)
        memory = torch.zeros(lots.randint(1, min(len(data) - start, 100_000)), dtype=torch.uint8)
        begun.append((start, memory, reads.begin(file, start, memory)))
    for start, memory, read in begun:
        read.wait()
        assert read.is_done()
        assert memory.numpy().tobytes() == data[start : start + len(memory)]
    reads.close()
    assert not background_reads._under_way


@KINDS
def test_what_the_file_does_not_have_is_an_error(file: WeightFile, kind: type[Any]) -> None:
    reads: Reads = kind(1)
    read = reads.begin(file, 3_000_000, torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(FluxsplitError, match="cut short"):
        read.wait()
    reads.close()


@LINUX
def test_with_few_descriptors_fewer_threads_read(file: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    another, left = WeightFile.another_handle, 2

    def scarce(self: WeightFile, *, alone: bool) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.EMFILE, "too many open files")
        left -= 1
        return another(self, alone=alone)

    monkeypatch.setattr(WeightFile, "another_handle", scarce)
    reads, memory = _LibraryReads(6), [torch.zeros(50, dtype=torch.uint8) for _ in range(9)]
    begun = [reads.begin(file, 10 * n, one) for n, one in enumerate(memory)]
    for n, (read, one) in enumerate(zip(begun, memory, strict=True)):
        read.wait()
        assert torch.equal(one, file.bytes_at(10 * n, 10 * n + 50))
    reads.close()


@LINUX
def test_what_the_library_does_not_read_is_read_all_the_same(file: WeightFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at first, then cancelled under way, then ended early."""
    library = background_reads._library()
    reads, memory = _LibraryReads(1), torch.zeros(1000, dtype=torch.uint8)
    wanted = file.bytes_at(7, 1007)

    class Refusing:
        aio_error, aio_suspend, aio_return = library.aio_error, library.aio_suspend, library.aio_return

        @staticmethod
        def aio_read(_: object) -> int:
            return -1

    monkeypatch.setattr(background_reads, "_library", lambda: Refusing)
    reads.begin(file, 7, memory).wait()
    assert torch.equal(memory, wanted)

    class Cancelled(Refusing):
        aio_read = library.aio_read
        ended = -1

        @classmethod
        def aio_return(cls, control: object) -> int:
            library.aio_return(control)
            return cls.ended

    for ended in (-1, 0, 300):
        memory.zero_()
        monkeypatch.setattr(Cancelled, "ended", ended)
        monkeypatch.setattr(background_reads, "_library", lambda: Cancelled)
        read = reads.begin(file, 7, memory)
        while not read.is_done():
            pass
        memory[max(0, ended) :] = 0
        read.wait()
        assert torch.equal(memory, wanted)
    reads.close()


@KINDS
def test_a_read_that_is_dropped_is_not_done_again(
    file: WeightFile, kind: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails takes its time over every answer."""
    reads: Reads = kind(1)
    asked = 0
    read_into = WeightFile.read_into

    def counted(self: WeightFile, buffer: memoryview, start: int, *, alone: bool) -> None:
        nonlocal asked
        asked += 1
        read_into(self, buffer, start, alone=alone)

    monkeypatch.setattr(WeightFile, "read_into", counted)
    reads.begin(file, 3_000_000, torch.zeros(2, dtype=torch.uint8)).drop()
    reads.close()
    assert asked == (kind is ThreadReads) and not background_reads._under_way


@LINUX
@pytest.mark.parametrize("wrong", ["bytes", "count", "never", "missing"])
def test_a_library_that_does_something_else_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library = background_reads._library()
    assert background_reads._works(), "as it is it works"

    class Other:
        aio_suspend = library.aio_suspend

        @staticmethod
        def aio_read(control: Any) -> int:
            if wrong != "bytes":
                return int(library.aio_read(control))
            ctypes.memset(control._obj.memory, 1, control._obj.count)
            return 0

        @staticmethod
        def aio_error(control: object) -> int:
            if wrong == "never":
                return errno.EINPROGRESS
            return 0 if wrong == "bytes" else int(library.aio_error(control))

        @staticmethod
        def aio_return(control: Any) -> int:
            got = control._obj.count if wrong == "bytes" else int(library.aio_return(control))
            return got - (wrong == "count")

    class Missing:
        pass

    monkeypatch.setattr(background_reads, "TRY_S", 0.05)
    monkeypatch.setattr(background_reads, "_library", lambda: Missing if wrong == "missing" else Other)
    background_reads._works.cache_clear()
    try:
        reads = reads_by(1)
        assert isinstance(reads, ThreadReads)
        reads.close()
    finally:
        background_reads._works.cache_clear()
        background_reads._under_way.clear()
