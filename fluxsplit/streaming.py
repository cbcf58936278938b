"""Brings each block's stored bytes to the device just before it is computed, from the user's own file.

A card cannot compute from the page cache, and not all blocks fit on it. Those that do stay there; the rest take
turns in two slots of device memory, each as large as the largest of them. A reader thread fills them in the order in
which the blocks are computed, one slot ahead: it reads a piece of the file into one of a few pinned pieces of RAM,
starts its copy on a stream of its own, and goes on to the next piece while it travels. Neither a second file nor the
model in RAM is made on the way, and float8 crosses the bus as float8.

    reader thread   disk → pinned piece ─┬─ copy stream ──→ slot   ┄ event `filled` ┄→  compute stream
                                         └ event `copied`: the piece is free             expands, multiplies
                    waits for `used`  ←┄┄┄┄┄┄┄┄┄ event `used` ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄   every picture

So there is an event both ways: compute waits on the device for `filled`, the copy stream for `used` before it writes
into the slot again. (diffusers' group offloading has neither, which is a race: diffusers#13502.) On a CPU the slots
are plain memory, there are no streams, and a queue each way does the ordering. Without a thread the same reads and
copies happen when a block is asked for; the bits are the same.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fluxsplit.errors import FluxsplitError
from fluxsplit.weights import Span, StoredLinear, WeightFile, WeightFiles

ALIGN_BYTES = 256
POLL_S = 0.5
OnRead = Callable[[int], None]
"""Is told how many bytes were read."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix lies in its block's memory."""

    linear: StoredLinear
    span: Span
    offset: int
    dtype: torch.dtype
    shape: torch.Size


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
            dtype, span = child.stored.dtype, child.span
            off = span.start % ALIGN_BYTES if as_mapped and span.start % dtype.itemsize == 0 else 0
            places.append(Place(child, span, at + off, dtype, child.stored.shape))
            at += -(-(off + span.bytes) // ALIGN_BYTES) * ALIGN_BYTES
    return Layout(tuple(places), at)


def attach(layout: Layout, memory: torch.Tensor) -> None:
    """Let the block's matrices be views of `memory`, a uint8 tensor that holds their bytes."""
    for place in layout.places:
        part = memory[place.offset : place.offset + place.span.bytes]
        place.linear.stored = part.view(place.dtype).view(place.shape)


class Copier:
    """Reads bytes of weight files into memory of the device, in pieces; on a CPU straight into it."""

    def __init__(
        self, files: WeightFiles, device: torch.device, piece_bytes: int, pieces: int, on_read: OnRead
    ) -> None:
        self._files, self._on_read = files, on_read
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pieces: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event | None]] = queue.SimpleQueue()
        if self.stream is not None:
            for _ in range(pieces):
                self._pieces.put((_pinned(piece_bytes), None))

    def fill(self, memory: torch.Tensor, layout: Layout) -> None:
        """Bring a block's bytes into `memory`; on a card the copies may still be under way on `stream`."""
        for place in layout.places:
            self._files.open(place.span.path).will_need(place.span.start, place.span.stop)
        for place in layout.places:
            span = place.span
            file, target = self._files.open(span.path), memory[place.offset : place.offset + span.bytes]
            if self.stream is None:
                file.read_into(_buffer(target), span.start)
            else:
                self._through_pieces(file, span.start, target)
            self._on_read(span.bytes)

    def _through_pieces(self, file: WeightFile, start: int, target: torch.Tensor) -> None:
        assert self.stream is not None
        done = 0
        while done < target.numel():
            piece, copied = self._pieces.get()
            if copied is not None:
                copied.synchronize()  # until its last copy has left it
            count = min(piece.numel(), target.numel() - done)
            file.read_into(_buffer(piece[:count]), start + done)
            with torch.cuda.stream(self.stream):
                target[done : done + count].copy_(piece[:count], non_blocking=True)
                copied = torch.cuda.Event()
                copied.record(self.stream)
            self._pieces.put((piece, copied))
            done += count


@dataclass(slots=True)
class _Slot:
    memory: torch.Tensor
    number: int = -1
    filled: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None
    failure: BaseException | None = field(default=None)


class Streaming:
    """Brings in blocks in the order 0, 1, ..., n-1, 0, 1, ...; those in `resident` once, before the first."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        files: WeightFiles,
        device: torch.device,
        *,
        resident: frozenset[int] = frozenset(),
        slots: int = 2,
        pieces: int = 4,
        piece_bytes: int = 32 << 20,
        ahead: bool = True,
        on_read: OnRead = lambda count: None,
    ) -> None:
        """Allocate everything and load what stays. With `ahead` a thread reads; without, the caller does."""
        self._files, self._device = files, device
        self._layouts = [layout(block, as_mapped=device.type == "cpu") for block in blocks]
        self._order = [number for number in range(len(blocks)) if number not in resident]
        self._copier = Copier(files, device, piece_bytes, pieces, on_read)
        for number in sorted(resident):
            self._load(self._layouts[number])
        largest = max((self._layouts[number].bytes for number in self._order), default=0)
        # Ordered by the events from the first use on; what the allocator hands out may still be in use before that.
        self._slots = [_Slot(_aligned(largest, device)) for _ in range(slots)]
        if self._copier.stream is not None:
            self._copier.stream.wait_stream(torch.cuda.current_stream(device))
        self._ahead = ahead
        self._thread: threading.Thread | None = None
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)

    @contextlib.contextmanager
    def brought_in(self, number: int) -> Iterator[None]:
        """While it is entered, block `number`'s matrices are on the device.

        Raises FluxsplitError where its bytes cannot be read, or where the file is not the one that was opened.
        """
        if number not in self._order:
            yield
            return
        slot = self._next(number)
        if slot.filled is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        attach(self._layouts[number], slot.memory)
        try:
            yield
        finally:
            if slot.filled is not None:
                slot.used = torch.cuda.Event()
                slot.used.record(torch.cuda.current_stream(self._device))
            self._free.put(slot)

    def close(self) -> None:
        """End the reader thread; blocks cannot be brought in afterwards."""
        if self._thread is not None:
            self._free.put(None)
            self._thread.join(timeout=30)

    def _next(self, number: int) -> _Slot:
        if not self._ahead:
            slot = self._free.get_nowait()
            assert slot is not None
            self._fill(slot, number)
            return slot
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="weights reader", daemon=True)
            self._thread.start()
        while True:
            with contextlib.suppress(queue.Empty):
                slot = self._ready.get(timeout=POLL_S)
                break
            if not self._thread.is_alive() and self._ready.empty():
                raise FluxsplitError("the thread that reads the weights ended", "run it again with --debug")
        if slot.failure is not None:
            raise _as_error(slot.failure)
        if slot.number != number:
            raise FluxsplitError(f"block {number} was asked for when block {slot.number} was next", "this is a bug")
        return slot

    def _read(self) -> None:
        """The reader thread: fills free slots in order, for ever."""
        slot: _Slot | None = None
        try:
            while True:
                for number in self._order:
                    slot = self._free.get()
                    if slot is None:
                        return
                    self._fill(slot, number)
                    self._ready.put(slot)
        except BaseException as error:  # whatever it was, the computation must not wait for ever nor go on
            self._ready.put(_Slot(torch.empty(0), failure=error))

    def _fill(self, slot: _Slot, number: int) -> None:
        stream = self._copier.stream
        if stream is not None and slot.used is not None:
            stream.wait_event(slot.used)
        slot.number = number
        self._copier.fill(slot.memory, self._layouts[number])
        self._files.check_unchanged()
        if stream is not None:
            slot.filled = torch.cuda.Event()
            slot.filled.record(stream)

    def _load(self, layout: Layout) -> None:
        memory = _aligned(layout.bytes, self._device)
        if self._copier.stream is not None:
            self._copier.stream.wait_stream(torch.cuda.current_stream(self._device))
        self._copier.fill(memory, layout)
        if self._copier.stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._copier.stream)
        attach(layout, memory)


def _aligned(count: int, device: torch.device) -> torch.Tensor:
    """Uninitialised memory that begins at a multiple of 256."""
    memory = torch.empty(count + ALIGN_BYTES, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGN_BYTES
    return memory[start : start + count]


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
    """What the reader met, as the computation is to raise it."""
    if isinstance(failure, FluxsplitError | MemoryError | RuntimeError):
        return failure
    return FluxsplitError(
        f"the thread that reads the weights was ended by {type(failure).__name__} {failure}".rstrip(),
        "run it again with --debug",
    )
