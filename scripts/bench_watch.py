"""Watches another process from outside: its anonymous memory, its CPU time, what it read from the disk. Linux only."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 0.005
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used by now."""

    wall_s: float
    cpu_s: float
    """All threads, user and system."""
    system_s: float
    """The kernel's share of it: page faults, mostly."""
    disk_bytes: int
    """Fetched from the storage, page faults included; 0 where the kernel does not tell."""


class AnonymousPeak:
    """The largest RssAnon of a process, looked at every 5 ms from when this is made until the process ends."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Look no more; returns the peak in bytes."""
        self._ended.set()
        self._thread.join()
        return self.peak_bytes

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            now = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
            if not now:
                return
            self.peak_bytes = max(self.peak_bytes, now[0])


def usage(pid: int) -> Usage:
    """What the process `pid` has used by now; raises OSError once it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system = int(fields[11]) * _TICK_S, int(fields[12]) * _TICK_S
    return Usage(time.monotonic(), user + system, system, _disk_bytes(pid))


def _disk_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget the file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_s(path: Path, block_bytes: int = 8 << 20) -> float:
    """Seconds to read the file from end to end, from wherever its pages are now."""
    buffer = bytearray(block_bytes)
    started_s = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            continue
    return time.monotonic() - started_s
