"""Threads that bring bytes of weight files into memory of the device, in pieces and in order.

Each has two pinned pieces of RAM: it reads a part of the file into one of them, starts its copy to the card, and reads
the next part into the other while that one travels. Neither a second file nor the model in RAM is made on the way.
Copying out of the page cache is what takes longest (5 to 20 GB/s a thread), so that several share it. They take parts
in order, so that the last ones of a block are on their way before the first of the next. Each asks for the
interpreter's lock as seldom as may be, since every wait for it costs what copying half a megabyte does.

To copy nothing and have the card fetch from the page cache itself, through parts of the map that are pinned in turn,
was tried and is slower: taking a pin away waits until the card is idle (docs/decisions.md, 2026-11-26).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fluxsplit.errors import FluxsplitError
from fluxsplit.memory_plan import PIECES_OF_READER
from fluxsplit.weights import WeightFiles

POLL_S = 0.5
Run = tuple[str, int, torch.Tensor]
"""A file, where to begin in it, and the uint8 memory that takes as many bytes."""


@dataclass(slots=True, eq=False)
class Filling:
    """Runs that are being brought in."""

    stream: torch.cuda.Stream | None
    fresh: bool
    parts: deque[Run] = field(default_factory=deque)
    left: int = 0
    done: threading.Event = field(default_factory=threading.Event)


class Readers:
    """Brings runs of files into memory of the device, through pinned pieces; on a CPU straight into it."""

    def __init__(self, files: WeightFiles, device: torch.device, count: int, piece_bytes: int) -> None:
        """With a `count` of 0 whoever begins does the reading."""
        self._files, self._device, self._piece_bytes = files, device, piece_bytes
        self._changed = threading.Condition()
        self._waiting: deque[Filling] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._own = None if count else self._pieces()
        self.threads = [
            threading.Thread(target=self._work, name=f"weights reader {number}", daemon=True) for number in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def begin(self, runs: Sequence[Run], stream: torch.cuda.Stream | None, fresh: bool) -> Filling:
        """Begin to bring runs in; on a card their copies go to `stream`. `fresh` bytes may not be in RAM yet."""
        filling = Filling(stream, fresh)
        for path, start, memory in runs:
            for at, part in _parts(memory, self._piece_bytes):
                filling.parts.append((path, start + at, part))
        filling.left = len(filling.parts)
        if self._own is not None:
            while filling.parts:
                self._read(filling.parts.popleft(), filling, self._own)
            filling.left = 0
        if not filling.left:
            filling.done.set()
            return filling
        with self._changed:
            self._waiting.append(filling)
            self._changed.notify_all()
        return filling

    def wait(self, filling: Filling) -> None:
        """Until all of it is read, on a card all its copies given to its stream; raises what a reader met."""
        while not filling.done.wait(POLL_S) and self._failure is None:
            if not all(thread.is_alive() for thread in self.threads):
                raise FluxsplitError("a thread that reads the weights ended", "run it again with --debug")
        if self._failure is not None:
            self.close()
            raise _as_error(self._failure)

    def close(self) -> None:
        """End the threads; what they have not begun is not done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self.threads:
            thread.join(timeout=30)

    def _work(self) -> None:
        try:
            pieces = self._pieces()
            while (taken := self._next()) is not None:
                filling, part = taken
                self._read(part, filling, pieces)
                with self._changed:
                    filling.left -= 1
                    if not filling.left:
                        filling.done.set()
        except BaseException as error:  # whatever it was, the computation must not wait for ever nor go on
            self._failure = error

    def _next(self) -> tuple[Filling, Run] | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            filling = self._waiting[0]
            part = filling.parts.popleft()
            if not filling.parts:
                self._waiting.popleft()
            return filling, part

    def _read(self, part: Run, filling: Filling, pieces: deque[_Piece]) -> None:
        path, start, target = part
        file = self._files.open(path)
        if filling.fresh:
            file.will_need(start, start + target.numel())
        if filling.stream is None:
            file.read_into(_buffer(target), start)
            return
        piece = pieces[0]
        pieces.rotate(1)
        if piece.copied is None:
            piece.copied = torch.cuda.Event(blocking=True)  # who waits for it sleeps
        else:
            piece.copied.synchronize()
        here = piece.memory[: target.numel()]
        file.read_into(_buffer(here), start)
        with torch.cuda.stream(filling.stream):
            target.copy_(here, non_blocking=True)
            piece.copied.record(filling.stream)

    def _pieces(self) -> deque[_Piece]:
        """A thread's own pieces; none on a CPU."""
        on_card = self._device.type == "cuda"
        return deque(_Piece(_pinned(self._piece_bytes)) for _ in range(PIECES_OF_READER if on_card else 0))


@dataclass(slots=True, eq=False)
class _Piece:
    memory: torch.Tensor
    copied: torch.cuda.Event | None = None
    """When its last copy has left it."""


def _parts(memory: torch.Tensor, most: int) -> list[tuple[int, torch.Tensor]]:
    """Memory in parts of about one size, none larger than `most`, with where each begins."""
    count = -(-memory.numel() // most)
    each = -(-memory.numel() // count) if count else 1
    return [(at, memory[at : at + each]) for at in range(0, memory.numel(), each)]


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
    """What a reader met, as the computation is to raise it."""
    if isinstance(failure, FluxsplitError | MemoryError | RuntimeError):
        return failure
    return FluxsplitError(
        f"a thread that reads the weights was ended by {type(failure).__name__} {failure}".rstrip(),
        "run it again with --debug",
    )
