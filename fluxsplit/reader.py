"""A thread that brings bytes of weight files into memory of the device, in pieces and in order.

To a card they go through a few pinned pieces of RAM: a piece is copied out of the file's map by several of torch's
threads at once, its copies to the card begin, and while they travel the next piece is filled. Neither a second file nor
the model in RAM is made on the way. Copying out of the page cache is what takes longest, 5 to 10 GB/s a thread, so that
it has to be shared; but not among threads of Python's. Whoever computes needs the interpreter's lock thousands of times
a step, and waits for it behind everybody who reads: beside twelve of them it launched a third of the kernels. Nor among
as many threads as there are cores: they wait for the slowest of them, which is the one that whoever computes has
pushed off its core (scripts/bench_floor.py).

Where that is too slow, which is where a thread never has to wait for the card, blocks are pinned in the page cache, one
after the other until it has to: the card fetches those by itself, and they cost neither a copy nor memory of ours, but
for the run their pages cannot be dropped from RAM. So there is a limit to them.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from fluxsplit.errors import FluxsplitError
from fluxsplit.memory_plan import PIECES
from fluxsplit.pinned import FilePins, pinned_ram
from fluxsplit.weights import Span, WeightFiles

POLL_S = 0.5
BEHIND = 0.1
"""A thread that waits for less than this share of its time is what everything waits for."""
T = TypeVar("T")

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

    @property
    def span(self) -> Span:
        """The bytes of the file."""
        return Span(self.path, self.start, self.stop)

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

    def __init__(
        self, files: WeightFiles, *, in_pieces: bool, piece_bytes: int, with_thread: bool, pin_bytes: int = 0
    ) -> None:
        """Without a thread of its own whoever begins a filling does the reading.

        At most `pin_bytes` of the files are pinned in the page cache.
        """
        self._files, self._piece_bytes = files, piece_bytes
        self._ring = deque(_Piece(pinned_ram(piece_bytes)) for _ in range(PIECES if in_pieces else 0))
        self._pins = FilePins(files, pin_bytes if with_thread else 0)
        self._pace = _Pace()
        self._copiers = copying_threads()  # asked here, since a thread that never asked takes over what another sets
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

    @property
    def pinned_bytes(self) -> int:
        """Of files, in the page cache."""
        return self._pins.bytes

    def close(self) -> None:
        """End the thread; what it has not begun is not done."""
        self._closed = True
        self._waiting.put(None)
        if self.thread is not None:
            self.thread.join(timeout=30)

    def unpin(self) -> None:
        """Let the files' pages go; nothing may be on its way from them."""
        self._pins.close()

    def _work(self) -> None:
        filling: Filling | None = None
        try:
            if self._ring:
                torch.set_num_threads(self._copiers)  # of this thread alone
            while (filling := self._pace.waiting(self._waiting.get)) is not None and not self._closed:
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
        if self._fetched(filling):
            return
        for runs in _shared(filling.runs, self._piece_bytes):
            if self._closed:
                return
            self._through_a_piece(runs, filling)
        if self._pace.is_behind() and not filling.fresh:
            self._pins.add([run.span for run in filling.runs])
            self._pace.forgive()

    def _fetched(self, filling: Filling) -> bool:
        """Have the card fetch what is pinned; False for a filling that is not."""
        parts = [(run.memory, self._pins.parts(run.span)) for run in filling.runs]
        if any(pinned is None for _, pinned in parts):
            return False
        for path in {run.path for run in filling.runs}:
            self._files.open(path).check_unchanged()
        assert filling.stream is not None
        with torch.cuda.stream(filling.stream):
            for memory, pinned in parts:
                start = 0
                for part in pinned or ():
                    memory[start : start + len(part)].copy_(part, non_blocking=True)
                    start += len(part)
        return True

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
            self._pace.waiting(piece.copied.synchronize)
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


class _Pace:
    """Whether the thread waits for others or others for it."""

    def __init__(self) -> None:
        self._since_s, self._waited_s = time.perf_counter(), 0.0

    def waiting(self, wait: Callable[[], T]) -> T:
        """What `wait` returns."""
        began_s = time.perf_counter()
        got = wait()
        self._waited_s += time.perf_counter() - began_s
        return got

    def is_behind(self) -> bool:
        """Since this was last asked."""
        now_s = time.perf_counter()
        behind = self._waited_s < BEHIND * (now_s - self._since_s)
        self._since_s, self._waited_s = now_s, 0.0
        return behind

    def forgive(self) -> None:
        """Whoever was pinned was read late, and so is what comes next."""
        self._waited_s = math.inf


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
    """How many of torch's threads copy: two cores are left to whoever computes."""
    return max(1, torch.get_num_threads() - 2)


def _buffer(memory: torch.Tensor) -> memoryview:
    """A uint8 tensor on the CPU as something that can be read into."""
    array: Any = memory.numpy()
    return memoryview(array)


def _as_error(failure: BaseException) -> BaseException:
    """What the thread met, as the computation is to raise it."""
    if isinstance(failure, FluxsplitError | MemoryError | RuntimeError):
        return failure
    return FluxsplitError(
        f"the thread that reads the weights was ended by {type(failure).__name__} {failure}".rstrip(),
        "run it again with --debug",
    )
