"""Reads of weight files that go on while Python computes, by threads that never want the interpreter's lock.

Whoever computes launches thousands of kernels a step from Python. A thread of Python's that reads beside it takes that
lock several times for every piece, each time at the cost of waking two threads: with six of them a pass over eight
pictures took nearly twice as long as without (docs/decisions.md, 2026-11-26). POSIX has reads that are carried out by
threads of the C library's own: whoever computes begins them, which takes a few microseconds, and later looks whether
they have ended. The C library gives the reads of one file descriptor to one thread, so that each thread gets its own.

Where there are none, or they do not do what they should in a first try, threads of Python's read.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from errno import EINPROGRESS
from pathlib import Path
from typing import Any, Protocol

import torch

from fluxsplit.errors import FluxsplitError
from fluxsplit.weights import WeightFile, as_buffer

POLL_S = 0.5
TRY_S = 5.0
"""After which a first try has failed."""
SIGEV_NONE = 1


class Read(Protocol):
    """Bytes of a file on their way into memory."""

    def is_done(self) -> bool:
        """Whether `wait` would not wait."""

    def wait(self) -> None:
        """Until they are there. To be called once; raises FluxsplitError where they cannot be read."""

    def drop(self) -> None:
        """Instead of `wait`: until nothing is written to the memory any more, whatever became of it."""


class Reads(Protocol):
    """Who carries reads out, several at a time, in the order in which they were begun."""

    def begin(self, file: WeightFile, start: int, memory: torch.Tensor, *, alone: bool = False) -> Read:
        """Begin to fill `memory`, uint8 on the CPU, with the bytes of `file` from `start`; as `read_into` does."""

    def close(self) -> None:
        """End the threads; every read must have been waited for or dropped."""


def reads_by(threads: int) -> Reads:
    """The best there is on this system, with so many threads."""
    return _LibraryReads(threads) if _works() else ThreadReads(threads)


class _Control(ctypes.Structure):
    """`struct aiocb` of 64-bit Linux, glibc's and musl's; what is their own is left out of account."""

    _fields_ = (
        ("handle", ctypes.c_int),
        ("operation", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("memory", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("signal_value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest_of_signal", ctypes.c_byte * 48),
        ("own", ctypes.c_byte * 32),
        ("start", ctypes.c_int64),
        ("more", ctypes.c_byte * 32),
    )


@functools.cache
def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.aio_return.restype = ctypes.c_ssize_t
    return library


_under_way: set[_Request] = set()
"""All that are begun: their memory must be there until they have ended, whatever becomes of who began them."""


class _Request:
    """A read that the C library was asked for."""

    def __init__(self, handle: int, start: int, memory: torch.Tensor) -> None:
        self._memory = memory
        self._control = _Control(handle=handle, memory=memory.data_ptr(), count=memory.numel(), start=start)
        self._control.notify = SIGEV_NONE
        _under_way.add(self)  # before the library has it: it may be interrupted in between
        self._begun = _library().aio_read(ctypes.byref(self._control)) == 0
        if not self._begun:
            _under_way.discard(self)

    def is_done(self) -> bool:
        return not self._begun or _library().aio_error(ctypes.byref(self._control)) != EINPROGRESS

    def end(self) -> int:
        """Wait; returns how many bytes were read, 0 where none could be."""
        one = (ctypes.c_void_p * 1)(ctypes.addressof(self._control))
        while not self.is_done():
            _library().aio_suspend(one, 1, None)
        _under_way.discard(self)
        return max(0, int(_library().aio_return(ctypes.byref(self._control)))) if self._begun else 0


class _LibraryRead:
    def __init__(self, file: WeightFile, handle: int, start: int, memory: torch.Tensor, alone: bool) -> None:
        self._file, self._start, self._memory, self._alone = file, start, memory, alone
        self._request = _Request(handle, start, memory)

    def is_done(self) -> bool:
        return self._request.is_done()

    def wait(self) -> None:
        got = self._request.end()
        if got < self._memory.numel():  # whatever the reason is, this goes on or says it
            self._file.read_into(as_buffer(self._memory[got:]), self._start + got, alone=self._alone)

    def drop(self) -> None:
        self._request.end()


class _LibraryReads:
    """By the C library."""

    def __init__(self, threads: int) -> None:
        self._threads, self._turn = threads, 0
        self._handles: dict[tuple[WeightFile, bool], list[int]] = {}

    def begin(self, file: WeightFile, start: int, memory: torch.Tensor, *, alone: bool = False) -> Read:
        if (file, alone) not in self._handles:
            self._handles[file, alone] = [file.another_handle(alone=alone)]
            # nothing is read ahead of a thread that reads alone, so that there are two of them at least
            threads = max(2, self._threads) if alone else self._threads
            with contextlib.suppress(OSError):  # with fewer, where no more are to be had, fewer threads read
                while len(self._handles[file, alone]) < threads:
                    self._handles[file, alone].append(file.another_handle(alone=alone))
        self._turn += 1
        handles = self._handles[file, alone]
        return _LibraryRead(file, handles[self._turn % len(handles)], start, memory, alone)

    def close(self) -> None:
        for handles in self._handles.values():
            for handle in handles:
                os.close(handle)
        self._handles.clear()


@functools.cache
def _works() -> bool:
    """Whether the C library reads as `_Control` says: a few bytes of the program that this is, as a try."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return False
    try:
        with Path(sys.executable).open("rb") as program:
            wanted = program.read(64)[5:]
            memory = torch.zeros(len(wanted), dtype=torch.uint8)
            request, until_s = _Request(program.fileno(), 5, memory), time.monotonic() + TRY_S
            while not request.is_done():
                if time.monotonic() > until_s:
                    return False
                time.sleep(0.0001)
            return request.end() == len(wanted) and memory.numpy().tobytes() == wanted
    except (OSError, AttributeError, TypeError):
        return False


class _ThreadRead:
    def __init__(self, reads: ThreadReads, read: Callable[[], None]) -> None:
        self._reads, self._read = reads, read
        self._done = threading.Event()
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._read()
        except BaseException as error:  # whatever it was, who waits must not wait for ever nor go on
            self._failure = error
        self._done.set()

    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        while not self._done.wait(POLL_S):
            self._reads.check_alive()
        if self._failure is not None:
            raise _as_error(self._failure)

    def drop(self) -> None:
        with contextlib.suppress(FluxsplitError, MemoryError, RuntimeError):
            self.wait()


class ThreadReads:
    """By threads of Python's."""

    def __init__(self, threads: int) -> None:
        self._waiting: queue.SimpleQueue[_ThreadRead | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self.threads = [threading.Thread(target=self._work, name="weights reader", daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def begin(self, file: WeightFile, start: int, memory: torch.Tensor, *, alone: bool = False) -> Read:
        read = _ThreadRead(self, functools.partial(file.read_into, as_buffer(memory), start, alone=alone))
        self._waiting.put(read)
        return read

    def check_alive(self) -> None:
        """Raise FluxsplitError where a thread is no more, and may have taken a read with it."""
        if self._failure is not None:
            raise _as_error(self._failure)
        if not all(thread.is_alive() for thread in self.threads):
            raise FluxsplitError("the thread that reads the weights ended", "run it again with --debug")

    def close(self) -> None:
        for _ in self.threads:
            self._waiting.put(None)
        for thread in self.threads:
            thread.join(timeout=30)

    def _work(self) -> None:
        try:
            while (read := self._waiting.get()) is not None:
                read.run()
        except BaseException as error:
            self._failure = error


def _as_error(failure: BaseException) -> BaseException:
    """What the thread met, as the computation is to raise it."""
    if isinstance(failure, FluxsplitError | MemoryError | RuntimeError):
        return failure
    return FluxsplitError(
        f"the thread that reads the weights was ended by {type(failure).__name__} {failure}".rstrip(),
        "run it again with --debug",
    )
