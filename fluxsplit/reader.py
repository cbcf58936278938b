"""Brings bytes of weight files into memory of the device: read ahead into pinned pieces of RAM, then copied.

Pieces take turns. One is filled with what the page cache or the disk holds of the file, as `background_reads` does it;
its copies to the card begin when it is full and it is known where they go; as soon as they have ended it can be filled
again. All of them together hold about three blocks, so that those that come next are read while others are computed.
Neither a second file nor the model in RAM is made on the way. Whoever computes does all of this in between, from one
thread: there is nothing to lock, and blocks leave for the card in the order in which they were begun.

Where the card comes to wait for reads, they are too slow for it, and take memory's bandwidth from whoever computes.
Blocks are then pinned in the page cache: the card fetches those by itself, and they cost neither a copy nor memory of
ours, but for the run their pages cannot be dropped from RAM. So only some of them may be, which the plan has spread
among the others: while those cross the bus reading goes on. A card that takes seconds for a step never gets there.
They have a stream of their own, since they may set off while one that comes before them is still being read.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fluxsplit.background_reads import Read, reads_by
from fluxsplit.file_spans import Span
from fluxsplit.pinned import FilePins, pinned_ram
from fluxsplit.weights import WeightFiles

LATE_BLOCKS = 3
"""That the card has waited for before any is pinned: one may be an accident."""
LATE_S = 0.0005
"""For how long it did, at least."""
MAX_GAP_BYTES = 1 << 20
"""Between two runs that share a piece: biases and norms, which lie among the matrices of a file."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of a file, and where they go: `at` of the memory that they are brought to."""

    span: Span
    at: int

    def within(self, start: int, stop: int) -> Run:
        """The part of it that lies in start..stop of the file."""
        first, last = max(start, self.span.start), min(stop, self.span.stop)
        return Run(replace(self.span, start=first, stop=last), self.at + first - self.span.start)


@dataclass(slots=True, eq=False)
class Filling:
    """Runs that are being brought in."""

    runs: Sequence[Run]
    given_back: Sequence[Span] = ()
    """Of files, what is not to stay in RAM once it is read."""
    pinnable: bool = False
    """Whether they are there, and may be pinned."""
    memory: torch.Tensor | None = None
    """Where they go, uint8, once that is known."""
    after: torch.cuda.Event | None = None
    """What the first of its copies has to wait for, on a card."""
    arrived: torch.cuda.Event | None = None
    """When the last of its copies has ended; None where there are no streams."""
    pinned: Sequence[tuple[int, torch.Tensor]] | None = None
    """What the card fetches by itself, and where it goes; None for one that is read."""
    parts: int = 0
    """That it is read in."""
    left: int = 0
    """Of these, how many are not copied yet."""


@dataclass(slots=True, eq=False)
class _Piece:
    memory: torch.Tensor
    copied: torch.cuda.Event | None = None
    """When its last copies have left it."""

    def is_free(self) -> bool:
        return self.copied is None or self.copied.query()


@dataclass(slots=True, eq=False)
class _Part:
    """Of a filling what goes through one piece."""

    filling: Filling
    runs: Sequence[Run]

    @property
    def span(self) -> Span:
        first = self.runs[0].span
        return replace(first, stop=max(run.span.stop for run in self.runs))


class Reader:
    """Brings fillings in, in the order in which they are begun."""

    def __init__(
        self,
        files: WeightFiles,
        *,
        pieces: int,
        piece_bytes: int,
        threads: int,
        streams: tuple[torch.cuda.Stream | None, torch.cuda.Stream | None] = (None, None),
    ) -> None:
        """`streams` are a card's: for what is read and for what is pinned."""
        self.streams = streams
        self._files, self._piece_bytes = files, piece_bytes
        self._pins, self._late = FilePins(files), 0
        self.reads = reads_by(threads)
        self._queued: deque[_Part] = deque()
        self._reading: deque[tuple[_Part, _Piece, Read]] = deque()
        self._free = deque(_Piece(pinned_ram(piece_bytes)) for _ in range(pieces))
        """In the order in which their copies end."""

    @property
    def is_full(self) -> bool:
        """Whether what is begun now would have to wait for a piece."""
        return bool(self._queued)

    @property
    def pinned_bytes(self) -> int:
        """Of files, in the page cache."""
        return self._pins.bytes

    def begin(self, filling: Filling) -> None:
        """Begin to read it, or as soon as there is room. Where it goes need not be known yet."""
        filling.pinned = self._pinned(filling)
        if filling.pinned is None:
            parts = [_Part(filling, runs) for runs in _shared(filling.runs, self._piece_bytes)]
            filling.parts = filling.left = len(parts)
            self._queued.extend(parts)
        self._go_on()

    def send(self, filling: Filling, memory: torch.Tensor, after: torch.cuda.Event | None) -> None:
        """Say where it goes, and when it may: what is read of it already sets off, the rest as it comes."""
        filling.memory, filling.after = memory, after
        if filling.pinned is not None:
            self._fetch(filling, filling.pinned)
        self._go_on()

    def wait(self, filling: Filling, computed: torch.cuda.Event | None = None) -> None:
        """Until all its copies are given to a stream, or made where there is none: then `arrived` is set.

        `computed` is the end of what the card has been given to compute. Raises FluxsplitError where the bytes cannot
        be read.
        """
        waited_s = 0.0
        while filling.left:
            if self._reading:
                began_s = time.perf_counter()
                self._copy_first()
                waited_s += time.perf_counter() - began_s
            else:  # every piece is on its way to the card
                copied = self._free[0].copied
                assert copied is not None
                copied.synchronize()
            self._go_on()
        if filling.pinnable and filling.pinned is None:
            self._late += waited_s >= LATE_S and (computed is None or computed.query())
            if self._late >= LATE_BLOCKS:
                self._pins.add([run.span for run in filling.runs])

    def close(self) -> None:
        """Let everything end that has begun; no more is brought in."""
        self._queued.clear()
        while self._reading:
            self._reading.popleft()[2].drop()
        self.reads.close()

    def unpin(self) -> None:
        """Let the files' pages go; nothing may be on its way from them."""
        self._pins.close()

    def _go_on(self) -> None:
        """All that can be done without waiting."""
        while self._reading and self._reading[0][0].filling.memory is not None and self._reading[0][2].is_done():
            self._copy_first()
        while self._queued and self._free and self._free[0].is_free():
            part, piece = self._queued.popleft(), self._free.popleft()
            span = part.span
            memory, alone = piece.memory[: span.bytes], bool(part.filling.given_back)
            read = self.reads.begin(self._files.open(span.path), span.start, memory, alone=alone)
            self._reading.append((part, piece, read))

    def _copy_first(self) -> None:
        """What was begun first, from its piece, as soon as that is full, to where it goes."""
        part, piece, read = self._reading.popleft()
        read.wait()
        filling, span = part.filling, part.span
        if filling.given_back:
            self._files.open(span.path).give_back(span.start, span.stop)
        stream, is_first, is_last = self.streams[0], filling.left == filling.parts, filling.left == 1
        with _on(stream, filling, is_first, is_last):
            for run in part.runs:
                start = run.span.start - span.start
                _copy(piece.memory[start : start + run.span.bytes], filling, run.at)
            if stream is not None:
                piece.copied = piece.copied or torch.cuda.Event(blocking=True)  # who waits for it sleeps
                piece.copied.record(stream)
        self._free.append(piece)
        filling.left -= 1
        if not filling.left:  # and what was read too far
            for span in filling.given_back:
                self._files.open(span.path).give_back(span.start, span.stop)

    def _pinned(self, filling: Filling) -> list[tuple[int, torch.Tensor]] | None:
        """What the card can fetch by itself; None for a filling of which not everything is pinned."""
        found = []
        for run in filling.runs:
            parts, at = self._pins.parts(run.span), run.at
            if parts is None:
                return None
            for part in parts:
                found.append((at, part))
                at += len(part)
        return found

    def _fetch(self, filling: Filling, pinned: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Have the card do so."""
        for path in {run.span.path for run in filling.runs}:
            self._files.open(path).check_unchanged()
        with _on(self.streams[1], filling, True, True):
            for at, part in pinned:
                _copy(part, filling, at)


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None, filling: Filling, is_first: bool, is_last: bool) -> Iterator[None]:
    """While it is entered copies go to the stream, the first of a filling after what it must wait for."""
    if stream is None:
        yield
        return
    if is_first and filling.after is not None:
        stream.wait_event(filling.after)
    with torch.cuda.stream(stream):
        yield
    if is_last:
        filling.arrived = torch.cuda.Event()
        filling.arrived.record(stream)


def _copy(source: torch.Tensor, filling: Filling, at: int) -> None:
    assert filling.memory is not None
    filling.memory[at : at + len(source)].copy_(source, non_blocking=True)


def _shared(runs: Sequence[Run], most: int) -> Iterator[list[Run]]:
    """Runs, cut and put together to what of one file spans at most `most` bytes."""
    together: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.span.path, run.span.start)):
        path, start = run.span.path, run.span.start
        while start < run.span.stop:
            first = together[0].span if together else None
            near = first is not None and first.path == path and start - together[-1].span.stop <= MAX_GAP_BYTES
            if first is None or not near or not 0 <= start - first.start < most:
                if together:
                    yield together
                together, first = [], run.within(start, run.span.stop).span
            stop = min(run.span.stop, first.start + most)
            together.append(run.within(start, stop))
            start = stop
    if together:
        yield together
