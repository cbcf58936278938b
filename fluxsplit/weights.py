"""Weight files, mapped and read without a copy; what is in them as tensors that are views of the map.

The file is mapped read-only and shared, so its pages belong to the page cache and cost no anonymous memory;
every tensor is a view into that map, float8 as stored.

A file that is changed or cut short under a run would give a wrong picture, so its size, times and inode are noted
when it is opened and compared before anything made of it is written (`check_unchanged`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fluxsplit.checkpoint import Source
from fluxsplit.errors import FluxsplitError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MADV_POPULATE_READ = 22
POPULATE_BYTES = 16 << 20
LARGE_PAGE_BYTES = 2 << 20
LARGE_AT_RANDOM = (5, 19)
"""The first Linux that is sure to read large pages where memory is said to be read at random, and not single ones."""
_CHANGED_HINT = "leave weight files alone while they are used, and run again"


class WeightFile:
    """A weight file: its read-only shared map, and reads that do not go through the map."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._stamp = _stamp(os.fstat(self._handle))
        if hasattr(os, "posix_fadvise"):  # read ahead twice as far, also when it is the map that is read
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._alone = _read_at_random(self._handle)
        self._map = mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)
        self._has_large_pages = False
        if hasattr(mmap, "MADV_HUGEPAGE"):  # read in 2 MB at once, mapped by one entry: a tenth of the kernel's time
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
                self._has_large_pages = True

    def check_unchanged(self) -> None:
        """Raise FluxsplitError where the file is not the one that was opened, or was written to since."""
        try:
            now = (_stamp(os.fstat(self._handle)), _stamp(Path(self.path).stat()))
        except OSError as error:
            raise FluxsplitError(f"{self.path} went away during the run: {error.strerror}", _CHANGED_HINT) from None
        if now != (self._stamp, self._stamp):
            raise FluxsplitError(f"{self.path} was changed during the run", _CHANGED_HINT)

    def read_into(self, buffer: memoryview, start: int, *, alone: bool = False) -> None:
        """Fill `buffer` with the file's bytes from `start`; raises FluxsplitError where the file ends before.

        With `alone` what lies behind them is not read ahead where the kernel can be told so.
        """
        done = 0
        while done < len(buffer):
            try:
                got = self._pread(self._alone if alone else self._handle, buffer[done:], start + done)
            except OSError as error:
                raise FluxsplitError(f"cannot read {self.path}: {error.strerror}", "check the disk") from error
            if not got:
                raise FluxsplitError(f"{self.path} was cut short during the run", _CHANGED_HINT)
            done += got

    def another_handle(self, *, alone: bool = False) -> int:
        """Of the same open file, for whoever reads it elsewhere, as `read_into` would; to be closed."""
        return os.dup(self._alone if alone else self._handle)

    def _pread(self, handle: int, buffer: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(handle, [buffer], start)
        if hasattr(os, "pread"):
            data = os.pread(handle, len(buffer), start)
            buffer[: len(data)] = data
            return len(data)
        # Windows, which lets nobody cut short what is mapped; a disk that fails is a crash there and no error
        count = min(len(buffer), len(self._map) - start)
        if count > 0:
            torch.frombuffer(buffer, dtype=torch.uint8, count=count).copy_(self.bytes_at(start, start + count))
        return max(0, count)

    def bytes_at(self, start: int, stop: int) -> torch.Tensor:
        """Bytes start..stop of the file as a uint8 view; must not be written to."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            return torch.frombuffer(self._map, dtype=torch.uint8, count=stop - start, offset=start)

    def map_pages(self, start: int, stop: int, *, alone: bool = False) -> None:
        """Read these bytes and map their pages (Linux 5.14); does nothing where the kernel cannot. Lets others run.

        With `alone` what lies behind them is not wanted, and not read ahead where the kernel can be told so.
        To ask for them ahead first (WILLNEED) makes it slower: the kernel answers in single pages, where faults in
        order bring in many at once.
        """
        if sys.platform != "linux":
            return
        with self._no_further(start, stop) if alone else contextlib.nullcontext():
            for at in range(start - start % mmap.PAGESIZE, stop, POPULATE_BYTES):
                if _madvise(self._address() + at, min(POPULATE_BYTES, stop - at), MADV_POPULATE_READ):
                    return

    @contextlib.contextmanager
    def _no_further(self, start: int, stop: int) -> Iterator[None]:
        """Have faults in here read a large page each and nothing behind it, as those of memory read at random do.

        Up to 28 MB behind each range of a block were read otherwise. For no longer than this: the pages of what is
        always read at random are the first that Linux forgets.
        """
        first = start - start % LARGE_PAGE_BYTES
        count = min(-(-stop // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES, len(self._map)) - first
        reads_large_pages = self._has_large_pages and reads_large_pages_at_random()
        if reads_large_pages:
            _madvise(self._address() + first, count, mmap.MADV_RANDOM)
        try:
            yield
        finally:
            if reads_large_pages:
                _madvise(self._address() + first, count, mmap.MADV_NORMAL)

    def _address(self) -> int:
        return self.bytes_at(0, 1).data_ptr()

    def give_back(self, start: int, stop: int) -> None:
        """Unmap these bytes and let the kernel forget the pages that lie in them whole."""
        self._advise("MADV_DONTNEED", start, stop)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, start, stop - start, os.POSIX_FADV_DONTNEED)

    def _advise(self, name: str, start: int, stop: int) -> None:
        if hasattr(mmap, name):
            page = start - start % mmap.PAGESIZE
            self._map.madvise(getattr(mmap, name), page, stop - page)


def _read_at_random(handle: int) -> int:
    """A handle of the same file, opened once more: how far the kernel reads ahead is a matter of each opening.

    `handle` itself where that cannot be had. Pages that stay should not come this way, as Linux makes them small ones.
    """
    if sys.platform != "linux":
        return handle
    try:
        another = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY)
    except OSError:
        return handle
    with contextlib.suppress(OSError):
        os.posix_fadvise(another, 0, 0, os.POSIX_FADV_RANDOM)
    return another


@functools.cache
def reads_large_pages_at_random() -> bool:
    """Whether this Linux does, where memory is to be in large pages and said to be read at random; else single ones.

    It does where large pages are of 2 MB, as on x86 (`do_sync_mmap_readahead` in mm/filemap.c).
    """
    try:
        large = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text().strip()
    except OSError:
        return False
    version = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    return large == str(LARGE_PAGE_BYTES) and version >= LARGE_AT_RANDOM


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _madvise(address: int, count: int, advice: int) -> int:
    """As mmap.madvise, but without holding the interpreter while the disk is read."""
    return int(_libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(count), ctypes.c_int(advice)))


class WeightFiles:
    """The maps of all files that the parts of a model are spread over, each opened once."""

    def __init__(self) -> None:
        self._files: dict[str, WeightFile] = {}

    def check_unchanged(self) -> None:
        """Raise FluxsplitError where any of the files was changed since it was opened."""
        for file in self._files.values():
            file.check_unchanged()

    def open(self, path: str) -> WeightFile:
        """The map of `path`."""
        if path not in self._files:
            self._files[path] = WeightFile(path)
        return self._files[path]

    def stored(self, source: Source) -> torch.Tensor:
        """A parameter as stored, [*source.shape], a view of the file unless its halves are exchanged."""
        info = source.tensor
        dtype = _DTYPES[source.dtype]
        row_bytes = math.prod(info.shape[1:]) * dtype.itemsize
        file = self.open(source.path)
        views = [file.bytes_at(info.start + a * row_bytes, info.start + b * row_bytes) for a, b in source.runs]
        raw = views[0] if len(views) == 1 else torch.cat(views)
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(source.shape)

    def scale(self, source: Source) -> float | None:
        """The factor that a scaled float8 matrix is to be multiplied with, or None."""
        if source.scale is None:
            return None
        raw = self.open(source.path).bytes_at(source.scale.start, source.scale.end)
        value = float(raw.clone().view(torch.float32))
        if not math.isfinite(value):
            raise FluxsplitError(f"{Path(source.path).name}: {source.scale.name} is {value}")
        return value


def as_buffer(memory: torch.Tensor) -> memoryview:
    """A uint8 tensor on the CPU as something that can be read into."""
    array: Any = memory.numpy()
    return memoryview(array)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
