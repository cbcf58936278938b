"""Threads that bring bytes of weight files into memory of the device, in pieces.

To a card they go through pinned pieces of RAM, two for each thread: a piece is filled with what the page cache or the
disk holds of the file, its copies to the card begin, and as soon as they have ended it is filled again. Neither a
second file nor the model in RAM is made on the way. A thread copies 5 or 6 GB/s out of the page cache, so that there
are several; but not many, and with large pieces, since whoever computes needs the interpreter's lock thousands of times
a step and waits for it behind everybody who reads: beside twelve of them with small pieces it launched a third of the
kernels. Nor torch's own threads: they spin while they wait, and all of them wait for the one that whoever computes has
pushed off its core, at worst for 4 GB/s (docs/decisions.md, 2026-11-26).

Where the threads work for more than a quarter of their time they take the processor from whoever computes, or are too
slow already. Blocks are then pinned in the page cache, one after the other until it is less: the card fetches those by
itself, and they cost neither a copy nor memory of ours, but for the run their pages cannot be dropped from RAM. So
only some of them may be, which the plan has spread among the others: while those cross the bus the threads go on.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fluxsplit.errors import FluxsplitError
from fluxsplit.memory_plan import PIECES
from fluxsplit.pinned import FilePins, as_buffer, pinned_ram
from fluxsplit.weights import Span, WeightFiles

POLL_S = 0.5
BUSY = 0.25
"""Share of their time for which threads may work."""
MAX_GAP_BYTES = 1 << 20
"""Between two runs that share a piece: biases and norms, which lie among the matrices of a file."""

T = TypeVar("T")


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
    """Runs that are being brought in; a card's copies go to `stream`."""

    runs: Sequence[Run]
    stream: torch.cuda.Stream | None
    fleeting: bool = False
    """Whether the bytes are not to stay in RAM."""
    pinnable: bool = False
    """Whether they are there, and may be pinned."""
    left: int = 0
    """Parts of it that are not read yet."""
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class _Piece:
    memory: torch.Tensor
    copied: torch.cuda.Event | None = None
    """When its last copies have left it."""


_Part = tuple[Filling, list[Run]]


class Reader:
    """Brings runs in, in order; `in_pieces` to where the file's bytes cannot be read to directly."""

    def __init__(self, files: WeightFiles, *, in_pieces: bool, piece_bytes: int, threads: int) -> None:
        """Without threads whoever begins a filling does the reading."""
        self._files, self._piece_bytes = files, piece_bytes
        self._pins, self._pace = FilePins(files), _Pace()
        self._lock, self._pinning = threading.Lock(), threading.Lock()
        self._waiting: queue.SimpleQueue[_Part | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        self._card = torch.cuda.current_device() if in_pieces and torch.cuda.is_available() else None
        each = PIECES if in_pieces and threads else int(in_pieces)
        pieces = [[_Piece(pinned_ram(piece_bytes)) for _ in range(each)] for _ in range(max(1, threads))]
        self._piece = next(iter(pieces[0]), None)
        self.threads = [
            threading.Thread(target=self._work, args=(own,), name="weights reader", daemon=True)
            for own in pieces[:threads]
        ]
        for thread in self.threads:
            thread.start()

    def begin(self, filling: Filling) -> None:
        """Begin to bring it in. Raises FluxsplitError where the file is not the one that was opened."""
        if self._fetched(filling):
            filling.done.set()
            return
        parts = list(_shared(filling.runs, self._piece_bytes)) if self._piece else [list(filling.runs)]
        filling.left = len(parts)
        for runs in parts:
            if self.threads:
                self._waiting.put((filling, runs))
            else:
                self._bring(runs, filling, self._piece)
        if not (self.threads and parts):
            filling.done.set()

    def wait(self, filling: Filling) -> None:
        """Until all of it is read, on a card all its copies given to its stream; raises what a thread met."""
        while not filling.done.wait(POLL_S) and self._failure is None:
            if not all(thread.is_alive() for thread in self.threads):
                raise FluxsplitError("the thread that reads the weights ended", "run it again with --debug")
        if self._failure is not None:
            raise _as_error(self._failure)

    @property
    def pinned_bytes(self) -> int:
        """Of files, in the page cache."""
        return self._pins.bytes

    def close(self) -> None:
        """End the threads; what they have not begun is not done."""
        self._closed = True
        for _ in self.threads:
            self._waiting.put(None)
        for thread in self.threads:
            thread.join(timeout=30)

    def unpin(self) -> None:
        """Let the files' pages go; nothing may be on its way from them."""
        self._pins.close()

    def _work(self, pieces: Sequence[_Piece]) -> None:
        filling: Filling | None = None
        turns = itertools.cycle(pieces or [None])
        try:
            if self._card is not None:
                torch.cuda.set_device(self._card)
            while (part := self._pace.waiting(self._waiting.get)) is not None and not self._closed:
                filling, runs = part
                self._bring(runs, filling, next(turns))
                with self._lock:
                    filling.left -= 1
                    last = not filling.left
                if last:
                    filling.done.set()
                    self._judge(filling)
        except BaseException as error:  # whatever it was, the computation must not wait for ever nor go on
            self._failure = error
            if filling is not None:
                filling.done.set()

    def _judge(self, filling: Filling) -> None:
        """Pin what was read where that is too much work; one thread at a time."""
        if not self._pinning.acquire(blocking=False):
            return
        try:
            if self._pace.is_busy(len(self.threads)) and filling.pinnable:
                self._pins.add([run.span for run in filling.runs])
                self._pace.is_busy(1)  # what that took is not to count
        finally:
            self._pinning.release()

    def _bring(self, runs: Sequence[Run], filling: Filling, piece: _Piece | None) -> None:
        """With a piece, runs of one file that fit it, gaps between them included."""
        if piece is not None:
            self._through(piece, runs, filling)
            return
        for run in runs:
            self._files.open(run.path).read_into(as_buffer(run.memory), run.start)
            if filling.fleeting:
                self._files.open(run.path).give_back(run.start, run.stop)

    def _through(self, piece: _Piece, runs: Sequence[Run], filling: Filling) -> None:
        file, start, stop = self._files.open(runs[0].path), runs[0].start, max(run.stop for run in runs)
        if piece.copied is not None:
            self._pace.waiting(piece.copied.synchronize)
        file.read_into(as_buffer(piece.memory[: stop - start]), start)
        if filling.fleeting:
            file.give_back(start, stop)
        assert filling.stream is not None
        with torch.cuda.stream(filling.stream):
            for run in runs:
                run.memory.copy_(piece.memory[run.start - start : run.stop - start], non_blocking=True)
        piece.copied = piece.copied or torch.cuda.Event(blocking=True)  # who waits for it sleeps
        piece.copied.record(filling.stream)

    def _fetched(self, filling: Filling) -> bool:
        """Have the card fetch what is pinned; False for a filling that is not."""
        parts = [(run.memory, self._pins.parts(run.span)) for run in filling.runs]
        if filling.stream is None or any(pinned is None for _, pinned in parts):
            return False
        for path in {run.path for run in filling.runs}:
            self._files.open(path).check_unchanged()
        with torch.cuda.stream(filling.stream):
            for memory, pinned in parts:
                start = 0
                for part in pinned or ():
                    memory[start : start + len(part)].copy_(part, non_blocking=True)
                    start += len(part)
        return True


class _Pace:
    """For how much of their time threads wait for others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since_s, self._waited_s = time.perf_counter(), 0.0
        self._began_s: dict[int, float] = {}
        """When those began to wait who are waiting now, by thread."""

    def waiting(self, wait: Callable[[], T]) -> T:
        """What `wait` returns."""
        thread = threading.get_ident()
        with self._lock:
            self._began_s[thread] = time.perf_counter()
        try:
            return wait()
        finally:
            with self._lock:
                self._waited_s += time.perf_counter() - max(self._began_s.pop(thread), self._since_s)

    def is_busy(self, threads: int) -> bool:
        """Whether so many threads worked for too much of their time since this was last asked."""
        with self._lock:
            now_s = time.perf_counter()
            waited_s = self._waited_s + sum(now_s - max(began_s, self._since_s) for began_s in self._began_s.values())
            passed_s, self._since_s, self._waited_s = now_s - self._since_s, now_s, 0.0
        return waited_s < (1 - BUSY) * threads * passed_s


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


def _as_error(failure: BaseException) -> BaseException:
    """What the thread met, as the computation is to raise it."""
    if isinstance(failure, FluxsplitError | MemoryError | RuntimeError):
        return failure
    return FluxsplitError(
        f"the thread that reads the weights was ended by {type(failure).__name__} {failure}".rstrip(),
        "run it again with --debug",
    )
