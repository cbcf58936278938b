"""A thread that brings bytes of weight files into memory of the device, in pieces and in order.

To a card they go through a few pinned pieces of RAM: a piece is copied out of the file's map by several of torch's
threads at once, its copies to the card begin, and while they travel the next piece is filled. Neither a second file nor
the model in RAM is made on the way. Copying out of the page cache is what takes longest, 5 to 10 GB/s a thread, so that
it has to be shared; but not among threads of Python's. Whoever computes needs the interpreter's lock thousands of times
a step, and waits for it behind everybody who reads: beside twelve of them it launched a third of the kernels. Nor among
as many threads as there are cores: they wait for the slowest of them, which is the one that whoever computes has
pushed off its core (scripts/bench_floor.py).

To copy nothing and have the card fetch from the page cache itself, through parts of the map that are pinned in turn,
was tried too: taking a pin away waits until the card is idle (docs/decisions.md, 2026-11-26).
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fluxsplit.errors import FluxsplitError
from fluxsplit.memory_plan import PIECES
from fluxsplit.weights import WeightFiles

POLL_S = 0.5
MAX_GAP_BYTES = 1 << 20
"""Between two runs that share a piece: biases and norms, which lie among the matrices of a file."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Bytes of a file from `start` on, and where they go: uint8 memory of as many."""

    path: str
    start: int
    memory: torch.Tensor

    @property
    def stop(self) -> int:
        """Where they end in the file."""
        return self.start + self.memory.numel()

    def within(self, start: int, stop: int) -> Run:
        """The part of it that lies in start..stop."""
        first, last = max(start, self.start), min(stop, self.stop)
        return Run(self.path, first, self.memory[first - self.start : last - self.start])


@dataclass(slots=True, eq=False)
class Filling:
    """Runs that are being brought in; in pieces their copies go to `stream`."""

    runs: Sequence[Run]
    stream: torch.cuda.Stream | None
    fresh: bool
    """Whether the bytes may not be in RAM yet."""
    fleeting: bool = False
    """Whether they are not to stay there."""
    done: threading.Event = field(default_factory=threading.Event)


class Reader:
    """Brings runs in, one filling after the other; `in_pieces` to where the file's bytes cannot be read to directly."""

    def __init__(self, files: WeightFiles, *, in_pieces: bool, piece_bytes: int, with_thread: bool) -> None:
        """Without a thread of its own whoever begins a filling does the reading."""
        self._files, self._piece_bytes = files, piece_bytes
        self._ring = deque(_Piece(_pinned(piece_bytes)) for _ in range(PIECES if in_pieces else 0))
        self._copiers = copying_threads()  # asked here: a thread that never asked would take over what the other one sets
        self._waiting: queue.SimpleQueue[Filling | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        self.thread: threading.Thread | None = None
        if with_thread:
            self.thread = threading.Thread(target=self._work, name="weights reader", daemon=True)
            self.thread.start()

    def begin(self, filling: Filling) -> None:
        """Begin to bring it in."""
        if self.thread is None:
            self._bring(filling)
            filling.done.set()
        else:
            self._waiting.put(filling)

    def wait(self, filling: Filling) -> None:
        """Until all of it is read, on a card all its copies given to its stream; raises what the thread met."""
        while not filling.done.wait(POLL_S) and self._failure is None:
            if self.thread is None or not self.thread.is_alive():
                raise FluxsplitError("the thread that reads the weights ended", "run it again with --debug")
        if self._failure is not None:
            raise _as_error(self._failure)

    def close(self) -> None:
        """End the thread; what it has not begun is not done."""
        self._closed = True
        self._waiting.put(None)
        if self.thread is not None:
            self.thread.join(timeout=30)

    def _work(self) -> None:
        filling: Filling | None = None
        try:
            if self._ring:
                torch.set_num_threads(self._copiers)  # of this thread alone
            while (filling := self._waiting.get()) is not None and not self._closed:
                self._bring(filling)
                filling.done.set()
        except BaseException as error:  # whatever it was, the computation must not wait for ever nor go on
            self._failure = error
            if filling is not None:
                filling.done.set()

    def _bring(self, filling: Filling) -> None:
        if not self._ring:
            for run in filling.runs:
                self._files.open(run.path).read_into(_buffer(run.memory), run.start)
                if filling.fleeting:
                    self._files.open(run.path).give_back(run.start, run.stop)
            return
        for runs in _shared(filling.runs, self._piece_bytes):
            if self._closed:
                return
            self._through_a_piece(runs, filling)

    def _through_a_piece(self, runs: Sequence[Run], filling: Filling) -> None:
        """Runs of one file that fit a piece, gaps between them included."""
        file, start, stop = self._files.open(runs[0].path), runs[0].start, max(run.stop for run in runs)
        file.check_unchanged()  # a page of the map beyond the end of a file that was cut short ends the process
        from_disk = filling.fresh and not file.is_in_ram(start, stop)
        if filling.fresh and not from_disk:
            file.map_pages(start, stop)
        piece = self._ring[0]
        self._ring.rotate(1)
        if piece.copied is not None:
            piece.copied.synchronize()
        if from_disk:  # in one request, as faults in the map would have it read in small pieces
            file.read_into(_buffer(piece.memory[: stop - start]), start)
        else:
            piece.memory[: stop - start].copy_(file.bytes_at(start, stop))
        if filling.fleeting:
            file.give_back(start, stop)
        assert filling.stream is not None
        with torch.cuda.stream(filling.stream):
            for run in runs:
                run.memory.copy_(piece.memory[run.start - start : run.stop - start], non_blocking=True)
        piece.copied = piece.copied or torch.cuda.Event(blocking=True)  # who waits for it sleeps
        piece.copied.record(filling.stream)


@dataclass(slots=True, eq=False)
class _Piece:
    memory: torch.Tensor
    copied: torch.cuda.Event | None = None
    """When its last copies have left it."""


def _shared(runs: Sequence[Run], most: int) -> Iterator[list[Run]]:
    """Runs, cut and put together to what of one file spans at most `most` bytes."""
    together: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.path, run.start)):
        start = run.start
        while start < run.stop:
            first = together[0] if together else None
            near = first is not None and first.path == run.path and start - together[-1].stop <= MAX_GAP_BYTES
            if first is None or not near or start - first.start >= most:
                if together:
                    yield together
                together, first = [], run.within(start, run.stop)
            stop = min(run.stop, first.start + most)
            together.append(run.within(start, stop))
            start = stop
    if together:
        yield together


def copying_threads() -> int:
    """How many of torch's threads copy, for one that has its own of them: the others are for whoever computes."""
    return max(1, torch.get_num_threads() // 2)


def _buffer(memory: torch.Tensor) -> memoryview:
    """A uint8 tensor on the CPU as something that can be read into."""
    array: Any = memory.numpy()
    return memoryview(array)


def _pinned(count: int) -> torch.Tensor:
    """RAM that the card can read by itself; plain RAM where the driver refuses (its copies then wait)."""
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(count, dtype=torch.uint8)


def _as_error(failure: BaseException) -> BaseException:
    """What the thread met, as the computation is to raise it."""
    if isinstance(failure, FluxsplitError | MemoryError | RuntimeError):
        return failure
    return FluxsplitError(
        f"the thread that reads the weights was ended by {type(failure).__name__} {failure}".rstrip(),
        "run it again with --debug",
    )
