"""Planes: stored activations of a VAE, [height, width, channels], in blocks of rows on the device, in RAM or on disk.

Channels last, so that any run of rows is one piece of memory. Blocks are made when first written and dropped when
their last row has been read. On a card all of them are of one size and are used again and again, for planes of any
width: as many as the plan has room for are one piece of the card's memory, which no allocator can fragment, and only
the rest are in RAM or on disk. On disk each block is a file that has no name any more when it is used: it ends with
the process, however that ends, and what was never written to the disk by then never is.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxsplit.decode_plan import BLOCK_BYTES, block_rows
from fluxsplit.errors import FluxsplitError
from fluxsplit.pinned import can_pin, pin, unpin

MADE_TOGETHER = 8
"""Blocks of RAM."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Memory for some rows of a plane."""

    memory: torch.Tensor
    """uint8, at least as much as was asked for, with whatever is in it."""
    pool: str = ""
    """Among which it waits to be used again, `kept` or `ram`; empty for memory that goes back at once."""


class Home:
    """Where the blocks of planes live."""

    def __init__(
        self,
        kind: str,
        device: torch.device,
        *,
        folder: str = "",
        block_bytes: int = 0,
        kept_blocks: int = 0,
        pin_bytes: int = 0,
    ) -> None:
        """`kind` is one of `decode_plan.HOMES`: where blocks go when the `kept_blocks` of the device are taken.

        Those in RAM are pinned, where that can be, `pin_bytes` of them at most. `folder` is for the files of `disk`.
        """
        self._kind, self._device, self._folder = kind, device, folder
        self.block_bytes = block_bytes
        """Of every block that is used again; 0 where none is."""
        kept = torch.empty(kept_blocks * block_bytes, dtype=torch.uint8, device=device)
        self._free: dict[str, list[Block]] = {"kept": [], "ram": []}
        if kept_blocks:
            self._free["kept"] += [Block(memory, "kept") for memory in kept.split(block_bytes)]
        self._left = pin_bytes if can_pin(device) else 0
        self._pinned: list[torch.Tensor] = []

    def take(self, count: int) -> Block:
        """A block of at least `count` bytes; raises FluxsplitError where a disk is full, MemoryError, or torch's."""
        if count <= self.block_bytes:
            for pool in ("kept", "ram"):
                if self._free[pool]:
                    return self._free[pool].pop()
        if self._kind == "device" and self._device.type != "cpu":
            return Block(torch.empty(count, dtype=torch.uint8, device=self._device))
        if self._kind != "ram":
            return Block(_mapped(count, self._folder if self._kind == "disk" else None))
        if count > self.block_bytes:
            return Block(_mapped(count, None))
        self._free["ram"] += [Block(memory, "ram") for memory in self._in_ram().split(self.block_bytes)]
        return self._free["ram"].pop()

    def give(self, block: Block) -> None:
        """Back for the next to take."""
        if block.pool:
            self._free[block.pool].append(block)

    def close(self) -> None:
        """Let go of what waits, and of the pins, after all copies; what is still in use stays what it is."""
        if self._pinned:
            torch.cuda.synchronize(self._device)
        for waiting in self._free.values():
            waiting.clear()
        while self._pinned:
            unpin(self._pinned.pop())

    def _in_ram(self) -> torch.Tensor:
        """Several blocks. In large pages where there are some: each is filled with zeros and pinned by itself."""
        memory = _mapped(MADE_TOGETHER * self.block_bytes, None, large_pages=True)
        if len(memory) <= self._left:
            if pin(memory):
                self._left -= len(memory)
                self._pinned.append(memory)
            else:
                self._left = 0
        return memory


class Plane:
    """An activation [height, width, channels]; rows are written once or added to, in order."""

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype, home: Home) -> None:
        self.height, self.width, self.channels = size
        self.dtype = dtype
        self._home = home
        row_bytes = self.width * self.channels * dtype.itemsize
        self._block_rows = min(self.height, block_rows(row_bytes, home.block_bytes or BLOCK_BYTES))
        self._blocks: dict[int, tuple[Block, torch.Tensor]] = {}

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Rows start..stop as views [n, width, channels], each with its first row's number, in order."""
        while start < stop:
            number, offset = divmod(start, self._block_rows)
            count = min(stop - start, self._block_rows - offset)
            yield start, self._block(number)[offset : offset + count]
            start += count

    def release(self, before: int) -> None:
        """Give back the blocks that lie wholly before a row."""
        for number in [n for n in self._blocks if (n + 1) * self._block_rows <= before]:
            self._home.give(self._blocks.pop(number)[0])

    def close(self) -> None:
        """Give everything back."""
        self.release(self.height + self._block_rows)

    def _block(self, number: int) -> torch.Tensor:
        if number not in self._blocks:
            rows = min(self._block_rows, self.height - number * self._block_rows)
            size = (rows, self.width, self.channels)
            count = math.prod(size) * self.dtype.itemsize
            block = self._home.take(count)
            self._blocks[number] = block, block.memory[:count].view(self.dtype).view(size)
        return self._blocks[number][1]


def _mapped(count: int, folder: str | None, *, large_pages: bool = False) -> torch.Tensor:
    """`count` bytes in a mapping of their own: of memory, or where a folder is given of a file without a name.

    malloc would keep what is freed, and break it up. A file's space is reserved here, so that a full disk is an error
    and not SIGBUS.
    """
    try:
        if folder is not None:
            mapped = _on_disk(count, folder)
        elif hasattr(mmap, "MAP_ANONYMOUS"):
            mapped = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            mapped = mmap.mmap(-1, count)
    except OSError as error:
        if folder is None:
            raise MemoryError(f"cannot map {count} bytes: {error.strerror}") from error
        place = folder or tempfile.gettempdir()
        raise FluxsplitError(
            f"cannot keep activations in {place}: {error.strerror}", "free some space, or set TMPDIR to another folder"
        ) from error
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _on_disk(count: int, folder: str) -> mmap.mmap:
    with tempfile.TemporaryFile(dir=folder or None) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, count)
        else:
            file.truncate(count)
        return mmap.mmap(file.fileno(), count)


def sent(piece: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A plane's rows on the device. Nobody waits for those that come from pinned RAM: all is in order on one stream."""
    return piece if piece.device == device else piece.to(device, non_blocking=piece.is_pinned())


def give_back_freed() -> None:
    """Let glibc hand what was freed to the system, as otherwise it keeps the holes of every pass; elsewhere nothing."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], object] | None:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
    return trim


def spill_folder(environment: dict[str, str] | os._Environ[str]) -> str:
    """Where spill files go: TMPDIR if set, else /var/tmp, which unlike /tmp is a disk everywhere, else the system's."""
    if environment.get("TMPDIR"):
        return environment["TMPDIR"]
    return "/var/tmp" if os.name == "posix" and Path("/var/tmp").is_dir() else tempfile.gettempdir()
