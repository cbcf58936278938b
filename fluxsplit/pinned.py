"""Memory that an NVIDIA card reads and writes by itself: pinned where it lies, be it RAM or a file's map.

Pins last until they are taken away, for which the driver waits until the card is idle: so nothing is pinned in turns.
On AMD cards nothing is pinned so, as that was seen to stall there (ComfyUI#16062).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch

from fluxsplit.file_spans import Span
from fluxsplit.weights import WeightFiles, as_buffer

_READ_ONLY = 8
"""cudaHostRegisterReadOnly."""


def can_pin(device: torch.device) -> bool:
    """Whether the device is one for which memory is pinned."""
    return device.type == "cuda" and torch.version.hip is None


def pin(memory: torch.Tensor, *, read_only: bool = False) -> bool:
    """Pin a tensor's memory; False where the driver refuses."""
    flags = _READ_ONLY if read_only else 0
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel() * memory.itemsize, flags)) == 0:
        return True
    forget_error()
    return False


def unpin(memory: torch.Tensor) -> None:
    """Take the pin away, after every copy."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())


def forget_error() -> None:
    """A refused pin is what CUDA answers once more when it is next asked how the last launch went."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


class FilePins:
    """Spans of weight files that lie in the page cache and are pinned there, for copies that no processor makes."""

    def __init__(self, files: WeightFiles) -> None:
        self._files, self._refused = files, False
        self._parts: dict[Span, tuple[torch.Tensor, ...]] = {}
        self._pinned: list[torch.Tensor] = []

    @property
    def bytes(self) -> int:
        """How many are pinned."""
        return sum(memory.numel() for memory in self._pinned)

    def parts(self, span: Span) -> tuple[torch.Tensor, ...] | None:
        """What a span consists of, in order, all of it pinned; None for one that is not."""
        return self._parts.get(span)

    def add(self, spans: Sequence[Span]) -> bool:
        """Pin these, or none of them: False where the driver refuses, which is then not asked again."""
        if self._refused:
            return False
        if all(span in self._parts for span in spans):
            return True
        for number, span in enumerate(spans):
            if not self._add(span):
                self._refused = True
                for done in spans[:number]:
                    del self._parts[done]
                return False
        return True

    def close(self) -> None:
        """Take all pins away; the copies must have ended."""
        self._parts.clear()
        while self._pinned:
            unpin(self._pinned.pop())

    def _add(self, span: Span) -> bool:
        """Whole pages are pinned where they are; of those at the ends, which others may share, a copy is made."""
        file = self._files.open(span.path)
        first, last = -(-span.start // mmap.PAGESIZE) * mmap.PAGESIZE, span.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= last:
            first = last = span.start
        whole = file.bytes_at(first, last) if last > first else None
        file.check_unchanged()
        if whole is not None and not pin(whole, read_only=True):
            return False
        ends = pinned_ram(first - span.start + span.stop - last)
        head, tail = ends[: first - span.start], ends[first - span.start :]
        for end, start in ((head, span.start), (tail, last)):
            file.read_into(as_buffer(end), start)
        self._parts[span] = tuple(part for part in (head, whole, tail) if part is not None and len(part))
        if whole is not None:
            self._pinned.append(whole)
        return True


def pinned_ram(count: int) -> torch.Tensor:
    """New RAM, uint8, that the card can read by itself; plain RAM where the driver refuses (its copies then wait)."""
    try:
        return torch.empty(count, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(count, dtype=torch.uint8)
