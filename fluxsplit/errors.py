"""Errors meant for the person at the keyboard: what happened, what to do, and the exit code.

    FluxsplitError        1  an item failed, a file is damaged or refused
    ├─ UsageError         2  an argument cannot be used as given
    ├─ ModelFileMissing   3  weights or tokenizers are not where they were looked for
    └─ OutOfMemory        4  a stage needs more memory than the device has

An OSError that escapes is told in the system's words (`refusal`); everything else is a bug of ours. `--debug` shows the
traceback of either.
"""

from __future__ import annotations

import os
from pathlib import Path

INTERRUPTED_EXIT_CODE = 130


class FluxsplitError(Exception):
    """What happened (`message`, with the values) and what to do about it (`hint`, may be empty)."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def line(self) -> str:
        """Message and hint on one line, control characters of file names and metadata made visible."""
        text = f"{self.message}; {self.hint}" if self.hint else self.message
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UsageError(FluxsplitError):
    """An argument cannot be used as given."""

    exit_code = 2


class ModelFileMissing(FluxsplitError):
    """Weights or tokenizers are not where they were looked for."""

    exit_code = 3


class OutOfMemory(FluxsplitError):
    """A stage needs more memory than the device has."""

    exit_code = 4


class DoesNotFit(OutOfMemory):
    """No plan of one item fits its budget; nothing was computed, and others may fit."""


class DiskFull(FluxsplitError):
    """A file cannot be written for want of room, and the next one neither."""


def refusal(error: OSError) -> FluxsplitError:
    """What the system would not do, in its words: a folder that may not be read, a full disk behind stdout."""
    where = f"{_closed(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
    return FluxsplitError(f"{where}{error.strerror or error}", "--debug shows where")


def _closed(name: str) -> Path:
    """The folder above it that may not be entered, as a person has named that one; else the path itself."""
    path = Path(name)
    above = reversed(path.parents)
    return next((folder for folder in above if os.access(folder, os.F_OK) and not os.access(folder, os.X_OK)), path)


def ends_all(error: FluxsplitError) -> bool:
    """Whether the items that follow would meet it too: memory that ran out, a disk that is full."""
    return isinstance(error, DiskFull) or (isinstance(error, OutOfMemory) and not isinstance(error, DoesNotFit))


_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "could not create a memory object",  # oneDNN
    "not enough memory",
    "hiperroroutofmemory",
    "device not ready",  # what WSL's driver says instead
    "_alloc_failed",
    "winerror 1455",
)
_WINDOWS_MEMORY_ERRORS = (8, 14, 1455)
"""Not enough memory, out of memory, the paging file is too small."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, the driver or Python says that memory ran out."""
    text = str(error).lower()
    if isinstance(error, MemoryError | OutOfMemory) or getattr(error, "winerror", None) in _WINDOWS_MEMORY_ERRORS:
        return True
    return any(word in text for word in _MEMORY_WORDS)


def memory_hint(stage: str) -> str:
    """What to do where a stage runs out of memory."""
    if stage in ("decode", "encode", "upscale"):
        return "close other programs, or give less by --vram"
    if stage == "text":
        return "close other programs, or use FP8 weights"
    return "close other programs, choose a smaller --size, or use FP8 weights"


ERRORS_BY_EXIT_CODE: dict[int, type[FluxsplitError]] = {
    error.exit_code: error for error in (FluxsplitError, UsageError, ModelFileMissing, OutOfMemory)
}
