"""Runs a stage as the product does, the card's allocator capped; notes its peaks, and at each step what was moved.

    python scripts/bench_stage.py STAGE REPORT CAP_BYTES        # 0 for no cap

The job and the events go the usual way. REPORT becomes a JSON file.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fluxsplit import reader, stages
from fluxsplit.events import Events
from fluxsplit.reader import Filling, Reader
from fluxsplit.streaming import Streaming


def main() -> int:
    """Cap, run the stage, report; returns the stage's exit code."""
    stage, report, cap_bytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if cap_bytes and torch.cuda.is_available():
        total_bytes = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total_bytes))
    report_on_the_way(report, moved := Moved(), host := Host())
    moved.count()
    host.watch()
    sys.argv = ["stages", stage]
    return stages.main()


class Moved:
    """Bytes of weights that were asked of the readers so far; none on a CPU, which computes from the map."""

    def __init__(self) -> None:
        self.bytes = 0
        self._readers: set[Reader] = set()

    @property
    def pinned_bytes(self) -> int:
        """Of the files, in the page cache, at this moment."""
        return sum(reader.pinned_bytes for reader in self._readers)

    def count(self) -> None:
        """From now on count what every reader is asked for."""
        begin = Reader.begin

        def counting(reader: Reader, filling: Filling) -> None:
            begin(reader, filling)
            self._readers.add(reader)
            self.bytes += sum(run.span.bytes for run in filling.runs)

        Reader.begin = counting  # type: ignore[method-assign, assignment]


@dataclass(slots=True)
class Host:
    """What whoever computes on a card has spent its time on so far; nothing on a CPU, which streams otherwise."""

    waiting_s: float = 0.0
    """For blocks, and giving them their places."""
    launching_s: float = 0.0
    """What blocks compute."""
    bringing_s: float = 0.0
    """Beginning to read and to copy those that come next."""
    copies: int = 0
    """Begun to the card."""

    def watch(self) -> None:
        """From now on look at the clock before and after every block, and count copies."""
        brought_in, copy = Streaming.brought_in, reader._copy

        @contextlib.contextmanager
        def watched(streaming: Streaming, number: int) -> Iterator[None]:
            asked_s = time.perf_counter()
            with brought_in(streaming, number):
                came_s = time.perf_counter()
                yield
                launched_s = time.perf_counter()
            self.waiting_s += came_s - asked_s
            self.launching_s += launched_s - came_s
            self.bringing_s += time.perf_counter() - launched_s

        def counted(source: torch.Tensor, filling: Filling, at: int) -> None:
            self.copies += 1
            copy(source, filling, at)

        Streaming.brought_in = watched  # type: ignore[method-assign, assignment]
        reader._copy = counted


def report_on_the_way(report: Path, moved: Moved, host: Host) -> None:
    """Write REPORT ahead of the event that ends the stage: whoever reads that closes stdin, and the process ends."""
    send = Events.send

    def telling(self: Events, event: str, **fields: Any) -> None:
        if event in ("done", "error"):
            report.write_text(json.dumps(peaks()))
        if event == "step":
            fields |= {"moved_bytes": moved.bytes, "pinned_bytes": moved.pinned_bytes, "host": asdict(host)}
        send(self, event, **fields)

    Events.send = telling  # type: ignore[method-assign]


def peaks() -> dict[str, int]:
    """The allocator's peaks in bytes, and how often it had to give memory back first; nothing without a card."""
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_device_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_device_reserved_bytes": torch.cuda.max_memory_reserved(),
        "allocator_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
    }


if __name__ == "__main__":
    exit_code = main()
    sys.stderr.flush()
    os._exit(exit_code)  # as the product's own entry ends
