"""Brings each block's stored bytes to the device just before it is computed, from the user's own file.

A card cannot compute from the page cache, and not all blocks fit on it. Those that do stay there; the rest take turns
in a ring of device memory, in the order in which they are computed: each has the place that the oldest have left, and
so many are there ahead of their turn as there is room for in one piece. The ring holds two of the largest at least;
where sizes are mixed it may have a gap at its end that is too small for the next one. Float8 crosses the bus as float8.

    reader  ── its streams ──→ ring ┄┄┄┄ compute waits for `arrived` ┄┄┄┄→  compute stream
            its streams wait for `used`  ←┄┄┄┄┄┄ event `used` ┄┄┄┄┄┄┄┄┄┄┄┄┄   every picture

So each waits for the other on the device: compute for the last copy of a block, and the copies for the computation that
was the last to use their place. (diffusers' group offloading has neither, which is a race: diffusers#13502.) On a CPU
the ring is plain memory and there are no streams. Where there is room for one block only, the same reads and copies
happen when a block is asked for; the bits are the same.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fluxsplit.errors import FluxsplitError
from fluxsplit.file_spans import Span, with_surroundings
from fluxsplit.memory_plan import ALIGN_BYTES, PIECE_BYTES, PIECES
from fluxsplit.reader import MAX_GAP_BYTES, Filling, Reader, Run
from fluxsplit.ring import Place, Ring
from fluxsplit.stored_layers import StoredLinear
from fluxsplit.weights import WeightFiles

MOST_AHEAD = 12
"""Blocks that are under way at once, however little room they need: those in pinned pages need none."""
OnRead = Callable[[int], None]
"""Is told how many bytes were read."""


@dataclass(frozen=True, slots=True)
class MatrixPlace:
    """Where a matrix lies in its block's memory."""

    linear: StoredLinear
    span: Span
    offset: int
    mapped: torch.Tensor
    """The matrix as it was before: a view of the file's map."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The matrices of one block, laid out in the order of the file."""

    places: tuple[MatrixPlace, ...]
    bytes: int


def layout(block: nn.Module, as_mapped: bool = False) -> Layout:
    """How a block's matrices lie in a slot; those that are in no one piece of the file are left where they are.

    Neighbours in the file are as far from each other as they are there, so that one copy brings both: what lies between
    them, biases mostly, comes along.
    A CPU's matrix products differ in the last bits with the alignment of their operands: with `as_mapped` every matrix
    is as far from a multiple of 256 as it is in the map.
    """
    spans = [(child.span, child) for child in block.modules() if isinstance(child, StoredLinear) and child.span]
    places: list[MatrixPlace] = []
    for span, linear in sorted(spans, key=lambda both: (both[0].path, both[0].start)):
        off = span.start % ALIGN_BYTES if as_mapped and span.start % linear.stored.itemsize == 0 else 0
        last, at = places[-1] if places else None, off
        if last is not None:
            at += -(-(last.offset + last.span.bytes) // ALIGN_BYTES) * ALIGN_BYTES
            as_in_file = last.offset + span.start - last.span.start
            if _is_near(last.span, span) and as_in_file % ALIGN_BYTES == off:
                at = as_in_file
        places.append(MatrixPlace(linear, span, at, linear.stored))
    stop = places[-1].offset + places[-1].span.bytes if places else 0
    return Layout(tuple(places), -(-stop // ALIGN_BYTES) * ALIGN_BYTES)


def attach(layout: Layout, memory: torch.Tensor) -> None:
    """Let the block's matrices be views of `memory`, a uint8 tensor that holds their bytes."""
    seen: dict[torch.dtype, torch.Tensor] = {}
    for place in layout.places:
        mapped = place.mapped
        if mapped.dtype not in seen:
            seen[mapped.dtype] = memory.view(mapped.dtype)
        whole = seen[mapped.dtype]
        start = whole.storage_offset() + place.offset // mapped.itemsize
        place.linear.stored = whole.as_strided(mapped.shape, mapped.stride(), start)


def detach(layout: Layout) -> None:
    """Let the block's matrices be in the file again, and nowhere else."""
    for place in layout.places:
        place.linear.stored = place.mapped


@dataclass(slots=True)
class _Coming:
    """A block that is under way: read ahead, and sent once it has a place."""

    number: int
    filling: Filling
    place: Place | None = None


class Streaming:
    """Brings in blocks in the order 0, 1, ..., n-1, 0, 1, ..., with `once` no further; those in `resident` before."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        files: WeightFiles,
        device: torch.device,
        *,
        resident: frozenset[int] = frozenset(),
        slots: int = 2,
        ahead: bool = True,
        readers: int = 1,
        once: bool = False,
        fleeting: frozenset[int] = frozenset(),
        as_card: bool | None = None,
        piece_bytes: int = PIECE_BYTES,
        pieces: int | None = None,
        spare_bytes: int = 0,
        pinnable: frozenset[int] = frozenset(),
        on_read: OnRead = lambda count: None,
    ) -> None:
        """Allocate everything and load what stays, read by `readers` threads through `pieces` of RAM, two each if None.

        The ring has room for `slots` of the largest block that streams, and `spare_bytes`.
        With `ahead` the blocks that come next are brought while one is computed; without, when they are asked for.
        `fleeting` are blocks for which there is no room in RAM: their pages are given back once they are read, so that
        those of the others stay.
        `pinnable` are those that are pinned in the page cache, where reading is what everything waits for.
        `as_card` is for tests of a CPU: with streams, as a card has them.
        """
        self._files, self._device, self._on_read = files, device, on_read
        self._layouts = [layout(block, as_mapped=device.type == "cpu") for block in blocks]
        self._runs = [_runs(layout) for layout in self._layouts]
        self._streamed = frozenset(range(len(blocks))) - resident
        order = sorted(self._streamed)
        self._order = iter(order) if once else itertools.cycle(order)
        self._fresh, self._pinnable = set(self._streamed), pinnable
        needed = [run.span for runs in self._runs for run in runs]
        self._given_back = {n: with_surroundings([run.span for run in self._runs[n]], needed) for n in fleeting}
        self._as_card = device.type == "cuda" if as_card is None else as_card
        count = PIECES * readers if pieces is None else pieces
        streams = (self._stream(), self._stream())
        self._reader = Reader(files, pieces=count, piece_bytes=piece_bytes, threads=readers, streams=streams)
        self._load(sorted(resident))
        largest = max((self._layouts[number].bytes for number in self._streamed), default=0)
        self._ring = Ring(_aligned(slots * largest + spare_bytes if largest else 0, device), self._now())
        self._coming: deque[_Coming] = deque()
        self._ahead = ahead
        if ahead:
            self._go_on()

    @contextlib.contextmanager
    def brought_in(self, number: int) -> Iterator[None]:
        """While it is entered, block `number`'s matrices are on the device.

        Raises FluxsplitError where its bytes cannot be read, or where the file is not the one that was opened.
        """
        if number not in self._streamed:
            yield
            return
        if not self._ahead:
            self._begin_next()
        if not self._coming or self._coming[0].number != number:
            coming = [block.number for block in self._coming]
            raise FluxsplitError(f"block {number} was asked for when {coming} were coming", "this is a bug")
        block = self._coming.popleft()
        if block.place is None and not self._send(block):
            raise FluxsplitError(f"there is no room for block {number}", "this is a bug")
        assert block.place is not None
        self._wait(block.filling, self._layouts[number])
        attach(self._layouts[number], block.place.memory)
        try:
            yield
        finally:
            block.place.leave(self._now())
            if self._ahead:
                self._go_on()

    def close(self) -> None:
        """End the reader threads and let go of the ring; blocks cannot be brought in afterwards.

        What has begun to come still comes: whoever gets the ring's memory next is behind it.
        """
        self._reader.close()
        for stream in self._reader.streams:
            if stream is not None:
                torch.cuda.current_stream(self._device).wait_stream(stream)
        if self._reader.pinned_bytes:
            torch.cuda.synchronize(self._device)
        self._reader.unpin()
        for number in self._streamed:
            detach(self._layouts[number])

    def _go_on(self) -> None:
        """Read as far ahead as there is room for; what comes next gets the places that are free."""
        while len(self._coming) < MOST_AHEAD and not self._reader.is_full and self._begin_next():
            pass
        for block in self._coming:
            if block.place is None and not self._send(block):
                break

    def _begin_next(self) -> bool:
        """Begin to read whichever block is next; False if none is."""
        number = next(self._order, None)
        if number is None:
            return False
        fresh, given_back = number in self._fresh, self._given_back.get(number, ())
        filling = Filling(self._runs[number], given_back, number in self._pinnable and not fresh)
        if not given_back:
            self._fresh.discard(number)
        self._reader.begin(filling)
        self._coming.append(_Coming(number, filling))
        return True

    def _send(self, block: _Coming) -> bool:
        """Have it come to the next place, after all that was computed from that so far; False if there is none yet."""
        block.place = self._ring.take(self._layouts[block.number].bytes)
        if block.place is None:
            return False
        self._reader.send(block.filling, block.place.memory, block.place.after)
        return True

    def _wait(self, filling: Filling, layout: Layout) -> None:
        """Until all is read; what is computed from now on waits on the device for the copies."""
        self._reader.wait(filling, computed=self._now())
        self._files.check_unchanged()
        if filling.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(filling.arrived)
        self._on_read(sum(place.span.bytes for place in layout.places))

    def _load(self, numbers: Sequence[int]) -> None:
        """Load what stays, all of it under way at once."""
        begun = []
        for number in numbers:
            memory, filling = _aligned(self._layouts[number].bytes, self._device), Filling(self._runs[number])
            self._reader.begin(filling)
            self._reader.send(filling, memory, self._now())  # what the allocator hands out may still be in use
            begun.append((self._layouts[number], memory, filling))
        for layout, memory, filling in begun:
            self._wait(filling, layout)
            attach(layout, memory)

    def _now(self) -> torch.cuda.Event | None:
        """When all that was computed so far has ended."""
        if not self._as_card:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device) if self._as_card else None


def _is_near(span: Span, following: Span) -> bool:
    """Whether a copy that brings both at once brings hardly more than both."""
    gap_bytes = following.start - span.stop
    return span.path == following.path and 0 <= gap_bytes <= min(MAX_GAP_BYTES, span.bytes // 100)


def _runs(layout: Layout) -> tuple[Run, ...]:
    """A block's matrices, near neighbours together with what is between them."""
    found: list[Run] = []
    for place in layout.places:
        last = found[-1] if found else None
        of_one = last is not None and last.span.path == place.span.path
        if last is not None and of_one and place.span.start - last.span.start == place.offset - last.at:
            found[-1] = Run(replace(last.span, stop=place.span.stop), last.at)
        else:
            found.append(Run(place.span, place.offset))
    return tuple(found)


def _aligned(count: int, device: torch.device) -> torch.Tensor:
    """Uninitialised memory that begins at a multiple of 256, as all that torch gives on a card does."""
    if device.type == "cuda":  # where a few bytes more may cost 2 MiB
        return torch.empty(count, dtype=torch.uint8, device=device)
    memory = torch.empty(count + ALIGN_BYTES, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGN_BYTES
    return memory[start : start + count]
