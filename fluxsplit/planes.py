"""Planes: stored activations of a VAE, [height, width, channels], in blocks of rows on the device, in RAM or on disk.

Channels last, so that any run of rows is one piece of memory. Blocks are made when first written and dropped when
their last row has been read; a dropped block's memory goes back at once. On disk each block is a file that has no name
any more when it is used: it ends with the process, however that ends, and what was never written to the disk by then
never is.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fluxsplit.decode_plan import block_rows
from fluxsplit.errors import FluxsplitError

POOL_STEP_BYTES = 1 << 20
"""Blocks of a pool are multiples of it, so that those of planes of other widths fit."""


class Pool:
    """Blocks of RAM for a card's planes, used again and again, pinned as far as may be.

    Fresh pages would be faulted in anew for every plane, and what is not pinned is slow to cross the bus.
    """

    def __init__(self, pin_bytes: int = 0) -> None:
        """Pin at most so much, with CUDA; on AMD cards pinned memory can stall (ComfyUI#16062)."""
        self._free: list[torch.Tensor] = []
        self._left = pin_bytes if torch.cuda.is_available() and torch.version.hip is None else 0
        self._pinned: list[torch.Tensor] = []

    def take(self, count: int) -> torch.Tensor:
        """At least `count` bytes, with whatever is in them: of what is free the smallest that will do."""
        fitting = [raw for raw in self._free if raw.numel() >= count]
        if not fitting:
            return self._made(-(-count // POOL_STEP_BYTES) * POOL_STEP_BYTES)
        best = min(fitting, key=torch.Tensor.numel)
        self._free = [raw for raw in self._free if raw is not best]
        return best

    def give(self, raw: torch.Tensor) -> None:
        """Back for the next to take."""
        self._free.append(raw)

    def close(self) -> None:
        """Take the pins away; what is still in use stays what it is."""
        while self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned.pop().data_ptr())

    def _made(self, count: int) -> torch.Tensor:
        raw = _mapped((count,), torch.uint8, None)
        if count <= self._left and int(torch.cuda.cudart().cudaHostRegister(raw.data_ptr(), count, 0)) == 0:
            self._left -= count
            self._pinned.append(raw)
        return raw


class Plane:
    """An activation [height, width, channels]; rows are written once or added to, in order."""

    def __init__(
        self,
        size: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        home: str,
        folder: str = "",
        pool: Pool | None = None,
    ) -> None:
        """`home` is one of `decode_plan.HOMES`; `folder` is for the files of `disk`, `pool` gives the RAM of `ram`."""
        self.height, self.width, self.channels = size
        self.dtype = dtype
        self._device = device if home == "device" else torch.device("cpu")
        self._folder = folder if home == "disk" else None
        self._pool = pool if home == "ram" else None
        row_bytes = self.width * self.channels * dtype.itemsize
        self._block_rows = min(self.height, block_rows(row_bytes))
        self._blocks: dict[int, torch.Tensor] = {}
        self._raw: dict[int, torch.Tensor] = {}

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
            del self._blocks[number]
            if self._pool is not None:
                self._pool.give(self._raw.pop(number))

    def close(self) -> None:
        """Give everything back."""
        self.release(self.height + self._block_rows)

    def _block(self, number: int) -> torch.Tensor:
        if number not in self._blocks:
            rows = min(self._block_rows, self.height - number * self._block_rows)
            size = (rows, self.width, self.channels)
            if self._device.type != "cpu":
                self._blocks[number] = torch.empty(size, dtype=self.dtype, device=self._device)
            elif self._pool is not None:
                count = math.prod(size) * self.dtype.itemsize
                self._raw[number] = self._pool.take(count)
                self._blocks[number] = self._raw[number][:count].view(self.dtype).view(size)
            else:
                self._blocks[number] = _mapped(size, self.dtype, self._folder)
        return self._blocks[number]


def _mapped(size: tuple[int, ...], dtype: torch.dtype, folder: str | None) -> torch.Tensor:
    """A tensor in a mapping of its own: of memory, or where a folder is given of a file without a name.

    malloc would keep what is freed, and break it up. A file's space is reserved here, so that a full disk is an error
    and not SIGBUS.
    """
    count = int(torch.Size(size).numel()) * dtype.itemsize
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
    return torch.frombuffer(mapped, dtype=dtype).view(size)


def _on_disk(count: int, folder: str) -> mmap.mmap:
    with tempfile.TemporaryFile(dir=folder or None) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, count)
        else:
            file.truncate(count)
        return mmap.mmap(file.fileno(), count)


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
