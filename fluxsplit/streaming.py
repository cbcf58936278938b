"""Brings each block's stored bytes to the device just before it is computed, from the user's own file.

A card cannot compute from the page cache, and not all blocks fit on it. Those that do stay there; the rest take
turns in two slots of device memory, each as large as the largest of them, filled one ahead in the order in which the
blocks are computed. A few threads do that (`reader`). Float8 crosses the bus as float8.

    reader  ── slot's stream ──→ slot ┄┄┄┄ compute waits for the slot's stream ┄┄┄┄→  compute stream
            slot's stream waits for `used`  ←┄┄┄┄┄┄┄┄┄ event `used` ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄   every picture

So each waits for the other on the device: compute for all that the slot's stream was given, and that stream for `used`
before it writes into the slot again. (diffusers' group offloading has neither, which is a race: diffusers#13502.) Every
slot has a stream of its own, so that the pieces of one do not wait for the other slot to be used. On a CPU the slots
are plain memory and there are no streams. Without threads the same reads and copies happen when a block is asked for;
the bits are the same.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fluxsplit.errors import FluxsplitError
from fluxsplit.memory_plan import PIECE_BYTES
from fluxsplit.reader import Filling, Reader, Run
from fluxsplit.stored_layers import StoredLinear
from fluxsplit.weights import Span, WeightFiles

ALIGN_BYTES = 256
OnRead = Callable[[int], None]
"""Is told how many bytes were read."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix lies in its block's memory."""

    linear: StoredLinear
    span: Span
    offset: int
    mapped: torch.Tensor
    """The matrix as it was before: a view of the file's map."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The matrices of one block, laid out one after the other."""

    places: tuple[Place, ...]
    bytes: int


def layout(block: nn.Module, as_mapped: bool = False) -> Layout:
    """How a block's matrices lie in a slot; those that are in no one piece of the file are left where they are.

    A CPU's matrix products differ in the last bits with the alignment of their operands: with `as_mapped` every matrix
    is as far from a multiple of 256 as it is in the map.
    """
    places, at = [], 0
    for child in block.modules():
        if isinstance(child, StoredLinear) and child.span is not None:
            span = child.span
            off = span.start % ALIGN_BYTES if as_mapped and span.start % child.stored.itemsize == 0 else 0
            places.append(Place(child, span, at + off, child.stored))
            at += -(-(off + span.bytes) // ALIGN_BYTES) * ALIGN_BYTES
    return Layout(tuple(places), at)


def attach(layout: Layout, memory: torch.Tensor) -> None:
    """Let the block's matrices be views of `memory`, a uint8 tensor that holds their bytes."""
    for place in layout.places:
        part = memory[place.offset : place.offset + place.span.bytes]
        place.linear.stored = part.view(place.mapped.dtype).view(place.mapped.shape)


def detach(layout: Layout) -> None:
    """Let the block's matrices be in the file again, and nowhere else."""
    for place in layout.places:
        place.linear.stored = place.mapped


@dataclass(slots=True)
class _Slot:
    memory: torch.Tensor
    stream: torch.cuda.Stream | None
    number: int = -1
    filling: Filling | None = None


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
        pinnable: frozenset[int] = frozenset(),
        on_read: OnRead = lambda count: None,
    ) -> None:
        """Allocate everything and load what stays, read by `readers` threads for a card and with `ahead` by one else.

        With `ahead` the next block is read while one is computed; without, when it is asked for.

        `fleeting` are blocks for which there is no room in RAM: their pages are given back once they are read, so that
        those of the others stay.
        `pinnable` are those that are pinned in the page cache, where reading is what everything waits for.
        `as_card` is for tests of a CPU: through pinned pieces and streams, as a card needs it.
        """
        self._files, self._device, self._on_read = files, device, on_read
        self._layouts = [layout(block, as_mapped=device.type == "cpu") for block in blocks]
        self._streamed = frozenset(range(len(blocks))) - resident
        order = sorted(self._streamed)
        self._order = iter(order) if once else itertools.cycle(order)
        self._fresh, self._fleeting, self._pinnable = set(self._streamed), fleeting, pinnable
        self._as_card = device.type == "cuda" if as_card is None else as_card
        threads = readers if self._as_card else int(ahead)
        self._reader = Reader(files, in_pieces=self._as_card, piece_bytes=piece_bytes, threads=threads)
        self._load([self._layouts[number] for number in sorted(resident)])
        largest = max((self._layouts[number].bytes for number in self._streamed), default=0)
        self._free = deque(_Slot(_aligned(largest, device), self._stream()) for _ in range(slots if largest else 0))
        self._coming: deque[_Slot] = deque()
        self._ahead = ahead
        for _ in range(len(self._free) if ahead else 0):
            self._fill_next()

    @contextlib.contextmanager
    def brought_in(self, number: int) -> Iterator[None]:
        """While it is entered, block `number`'s matrices are on the device.

        Raises FluxsplitError where its bytes cannot be read, or where the file is not the one that was opened.
        """
        if number not in self._streamed:
            yield
            return
        if not self._ahead:
            self._fill_next()
        if not self._coming or self._coming[0].number != number:
            coming = [slot.number for slot in self._coming]
            raise FluxsplitError(f"block {number} was asked for when {coming} were coming", "this is a bug")
        slot = self._coming.popleft()
        assert slot.filling is not None
        self._wait(slot.filling, self._layouts[number])
        attach(self._layouts[number], slot.memory)
        try:
            yield
        finally:
            self._free.append(slot)
            if self._ahead:
                self._fill_next()

    def close(self) -> None:
        """End the reader threads and let go of the slots; blocks cannot be brought in afterwards.

        What has begun to come still comes: whoever gets the slots' memory next is behind it.
        """
        self._reader.close()
        for slot in (*self._coming, *self._free):
            if slot.stream is not None:
                torch.cuda.current_stream(self._device).wait_stream(slot.stream)
        if self._reader.pinned_bytes:
            torch.cuda.synchronize(self._device)
        self._reader.unpin()
        for number in self._streamed:
            detach(self._layouts[number])

    def _fill_next(self) -> None:
        """Begin to bring in whichever block is next, if one is, after all that was computed from its slot so far."""
        number = next(self._order, None)
        if number is None:
            return
        slot = self._free.popleft()
        if slot.stream is not None:
            used = torch.cuda.Event()
            used.record(torch.cuda.current_stream(self._device))
            slot.stream.wait_event(used)
        slot.number = number
        fresh, fleeting = number in self._fresh, number in self._fleeting
        pinnable = number in self._pinnable and not fresh
        slot.filling = self._begin(self._layouts[number], slot.memory, slot.stream, fleeting, pinnable)
        if number not in self._fleeting:
            self._fresh.discard(number)
        self._coming.append(slot)

    def _begin(
        self,
        layout: Layout,
        memory: torch.Tensor,
        stream: torch.cuda.Stream | None,
        fleeting: bool = False,
        pinnable: bool = False,
    ) -> Filling:
        runs = [
            Run(place.span.path, place.span.start, memory[place.offset : place.offset + place.span.bytes])
            for place in layout.places
        ]
        filling = Filling(runs, stream, fleeting, pinnable)
        self._reader.begin(filling)
        return filling

    def _wait(self, filling: Filling, layout: Layout) -> None:
        """Until all is read; what is computed from now on waits on the device for the copies."""
        self._reader.wait(filling)
        self._files.check_unchanged()
        if filling.stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(filling.stream)
        self._on_read(sum(place.span.bytes for place in layout.places))

    def _load(self, layouts: list[Layout]) -> None:
        """Load what stays, all of it under way at once."""
        begun, stream = [], self._stream()
        for one in layouts:
            memory = _aligned(one.bytes, self._device)
            if stream is not None:  # what the allocator hands out may still be in use
                stream.wait_stream(torch.cuda.current_stream(self._device))
            begun.append((one, memory, self._begin(one, memory, stream)))
        for one, memory, filling in begun:
            self._wait(filling, one)
            attach(one, memory)

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device) if self._as_card else None


def _aligned(count: int, device: torch.device) -> torch.Tensor:
    """Uninitialised memory that begins at a multiple of 256, as all that torch gives on a card does."""
    if device.type == "cuda":  # where a few bytes more may cost 2 MiB
        return torch.empty(count, dtype=torch.uint8, device=device)
    memory = torch.empty(count + ALIGN_BYTES, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGN_BYTES
    return memory[start : start + count]
