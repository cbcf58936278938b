"""Brings each block's stored bytes to the device just before it is computed, from the user's own file.

A card cannot compute from the page cache, and not all blocks fit on it. Those that do stay there; the rest take
turns in two slots of device memory, each as large as the largest of them. They are filled in the order in which the
blocks are computed, one slot ahead, by a few threads: each reads a piece of the file into a pinned piece of RAM,
starts its copy on the slot's stream, and goes on to the next piece while that one travels. Neither a second file nor
the model in RAM is made on the way, and float8 crosses the bus as float8.

    reader threads  disk → pinned piece ─┬─ slot's stream ──→ slot ┄┄┄ compute waits for it ┄┄┄→  compute stream
                                         └ event `copied`: the piece is free                     expands, multiplies
              slot's stream waits for `used`  ←┄┄┄┄┄┄┄┄┄ event `used` ┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄┄   every picture

So each waits for the other on the device: compute for all that the slot's stream was given, and that stream for `used`
before it writes into the slot again. (diffusers' group offloading has neither, which is a race: diffusers#13502.) Every
slot has a stream of its own, so that the pieces of one do not wait for the other slot to be used. The threads take
pieces in order, so that a slot's last ones are on their way before the next slot's first. On a CPU the slots are plain
memory and there are no streams. Without threads the same reads and copies happen when a block is asked for; the bits
are the same.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fluxsplit.errors import FluxsplitError
from fluxsplit.weights import Span, StoredLinear, WeightFiles

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

    def __init__(self, files: WeightFiles, device: torch.device, piece_bytes: int, pieces: int, readers: int) -> None:
        """With no `readers` whoever fills does the reading."""
        self._files, self._piece_bytes = files, piece_bytes
        self._begun: list[threading.Thread] = []
        self._threads = ThreadPoolExecutor(readers, "weights reader", self._note_thread) if readers else None
        self._pieces: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event | None]] = queue.SimpleQueue()
        if device.type == "cuda":
            for _ in range(pieces):
                self._pieces.put((_pinned(piece_bytes), None))

    def fill(self, memory: torch.Tensor, layout: Layout, stream: torch.cuda.Stream | None) -> list[Future[None]]:
        """Begin to bring a block's bytes into `memory`: what is to be waited for until `stream` has all its copies."""
        parts = []
        for place in layout.places:
            for done in range(0, place.span.bytes, self._piece_bytes):
                count = min(self._piece_bytes, place.span.bytes - done)
                target = memory[place.offset + done : place.offset + done + count]
                parts.append(self._begin(place.span.path, place.span.start + done, target, stream))
        return parts

    def wait(self, parts: list[Future[None]]) -> None:
        """Until all that `fill` began is read; raises what a reader met, ends the others then."""
        for part in parts:
            if (failure := self._failure(part)) is not None:
                self.close()
                raise failure

    def _failure(self, part: Future[None]) -> BaseException | None:
        failure: BaseException | None = None
        while True:
            try:
                failure = part.exception(POLL_S)
                break
            except CancelledError as error:
                failure = error
                break
            except TimeoutError:  # a thread that is killed between two parts takes the next one with it
                if not all(thread.is_alive() for thread in self._begun):
                    return FluxsplitError("a thread that reads the weights ended", "run it again with --debug")
        if failure is None or isinstance(failure, FluxsplitError | MemoryError | RuntimeError):
            return failure
        return FluxsplitError(
            f"a thread that reads the weights was ended by {type(failure).__name__} {failure}".rstrip(),
            "run it again with --debug",
        )

    def close(self) -> None:
        """End the threads; what they have not begun is not done."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    def _note_thread(self) -> None:
        self._begun.append(threading.current_thread())

    def _begin(self, path: str, start: int, target: torch.Tensor, stream: torch.cuda.Stream | None) -> Future[None]:
        if self._threads is not None:
            return self._threads.submit(self._read, path, start, target, stream)
        done: Future[None] = Future()
        try:
            self._read(path, start, target, stream)
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done

    def _read(self, path: str, start: int, target: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        file = self._files.open(path)
        file.will_need(start, start + target.numel())
        if stream is None:
            file.read_into(_buffer(target), start)
            return
        piece, copied = self._pieces.get()
        try:
            if copied is not None:
                copied.synchronize()  # until its last copy has left it
            here = piece[: target.numel()]
            file.read_into(_buffer(here), start)
            with torch.cuda.stream(stream):
                target.copy_(here, non_blocking=True)
                copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps
                copied.record(stream)
        finally:
            self._pieces.put((piece, copied))


@dataclass(slots=True)
class _Slot:
    memory: torch.Tensor
    stream: torch.cuda.Stream | None
    number: int = -1
    parts: list[Future[None]] = field(default_factory=list)


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
        pieces: int = 8,
        piece_bytes: int = 16 << 20,
        readers: int = 4,
        ahead: bool = True,
        on_read: OnRead = lambda count: None,
    ) -> None:
        """Allocate everything and load what stays. With `ahead` threads read; without, the caller does."""
        self._files, self._device, self._on_read = files, device, on_read
        self._layouts = [layout(block, as_mapped=device.type == "cpu") for block in blocks]
        self._streamed = frozenset(range(len(blocks))) - resident
        self._order = itertools.cycle(sorted(self._streamed))
        self._copier = Copier(files, device, piece_bytes, pieces, readers if ahead else 0)
        self._load([self._layouts[number] for number in sorted(resident)])
        largest = max((self._layouts[number].bytes for number in self._streamed), default=0)
        self._slots = [_Slot(_aligned(largest, device), self._stream()) for _ in range(slots if largest else 0)]
        self._ahead = ahead
        self._coming: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for slot in self._slots:
            if ahead:
                self._fill(slot)
            self._coming.put(slot)

    @contextlib.contextmanager
    def brought_in(self, number: int) -> Iterator[None]:
        """While it is entered, block `number`'s matrices are on the device.

        Raises FluxsplitError where its bytes cannot be read, or where the file is not the one that was opened.
        """
        if number not in self._streamed:
            yield
            return
        slot = self._coming.get()
        if not self._ahead:
            self._fill(slot)
        if slot.number != number:
            raise FluxsplitError(f"block {number} was asked for when block {slot.number} was next", "this is a bug")
        self._wait(slot.parts, self._layouts[number], slot.stream)
        attach(self._layouts[number], slot.memory)
        try:
            yield
        finally:
            if self._ahead:
                self._fill(slot)
            self._coming.put(slot)

    def close(self) -> None:
        """End the reader threads; blocks cannot be brought in afterwards."""
        self._copier.close()

    def _fill(self, slot: _Slot) -> None:
        """Begin to bring in whichever block is next, after all that was computed from the slot so far."""
        if slot.stream is not None:
            used = torch.cuda.Event()
            used.record(torch.cuda.current_stream(self._device))
            slot.stream.wait_event(used)
        slot.number = next(self._order)
        slot.parts = self._copier.fill(slot.memory, self._layouts[slot.number], slot.stream)

    def _wait(self, parts: list[Future[None]], layout: Layout, stream: torch.cuda.Stream | None) -> None:
        """Until all parts are read; what is computed from now on waits on the device for their copies."""
        self._copier.wait(parts)
        self._files.check_unchanged()
        if stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(stream)
        self._on_read(sum(place.span.bytes for place in layout.places))

    def _load(self, layouts: list[Layout]) -> None:
        """Load what stays, all of it under way at once."""
        begun, stream = [], self._stream()
        for one in layouts:
            memory = _aligned(one.bytes, self._device)
            if stream is not None:  # what the allocator hands out may still be in use
                stream.wait_stream(torch.cuda.current_stream(self._device))
            begun.append((one, memory, self._copier.fill(memory, one, stream)))
        for one, memory, parts in begun:
            self._wait(parts, one, stream)
            attach(one, memory)

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device) if self._device.type == "cuda" else None


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
