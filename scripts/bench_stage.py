"""Runs a stage as the product does, the card's allocator capped; notes its peaks, and at each step what was moved.

    python scripts/bench_stage.py STAGE REPORT CAP_BYTES        # 0 for no cap
    python scripts/bench_stage.py STAGE REPORT CAP_BYTES WEIGHTS IMAGE_TOKENS TEXT_TOKENS DTYPE

The job and the events go the usual way. REPORT becomes a JSON file. With WEIGHTS, and on a CPU alone, one of a step's
matrix products is made after each block, in turns, to be compared with the blocks beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import bench_floor
from bench_fp8 import once_s
from fluxsplit import checkpoint, reader, stages
from fluxsplit.device import DTYPES
from fluxsplit.events import Events
from fluxsplit.read_ahead import ReadAhead
from fluxsplit.reader import Filling, Reader
from fluxsplit.streaming import Streaming


def main() -> int:
    """Cap, run the stage, report; returns the stage's exit code."""
    stage, report, cap_bytes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if cap_bytes and torch.cuda.is_available():
        total_bytes = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total_bytes))
    blocks = Blocks(Between(*sys.argv[4:8]) if sys.argv[4:] else None)
    report_on_the_way(report, moved := Moved(), host := Host(), blocks)
    moved.count()
    host.watch()
    blocks.watch()
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


class Between:
    """The matrix products of a step, of which one is made and timed when it is asked for, in turns."""

    def __init__(self, weights: str, image_tokens: str, text_tokens: str, dtype: str) -> None:
        part, cpu = checkpoint.part(Path(weights), "transformer"), torch.device("cpu")
        self._work = bench_floor.work(part, int(image_tokens), int(text_tokens), DTYPES[dtype], cpu)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget what was made so far, as beside a first step, which is cold."""
        self._taken_s: list[list[tuple[float, float]]] = [[] for _ in self._work]
        self._made = 0

    @property
    def compute_s(self) -> tuple[float, float]:
        """Seconds of all products of a step by the mean of each, by the clock and of all threads; 0 before all are."""
        wall_s = cpu_s = 0.0
        for (count, _), taken_s in zip(self._work, self._taken_s, strict=True):
            if not taken_s:
                return 0.0, 0.0
            wall_s += count * mean(wall_s for wall_s, _ in taken_s)
            cpu_s += count * mean(cpu_s for _, cpu_s in taken_s)
        return wall_s, cpu_s

    def make_one(self, reader_s: Callable[[], float]) -> float:
        """The next one; returns the CPU seconds of a thread that read meanwhile, which are none of the product's."""
        number, before_s = self._made % len(self._work), reader_s()
        wall_s, cpu_s = once_s(self._work[number][1], torch.device("cpu"))
        read_s = reader_s() - before_s
        self._taken_s[number].append((wall_s, cpu_s - read_s))
        self._made += 1
        return read_s


class Blocks:
    """How long a CPU took for each block since it was last asked; nothing on a card, which computes behind the host."""

    def __init__(self, between: Between | None = None) -> None:
        self.between = between
        self._taken_s: list[tuple[float, float]] = []

    def end_step(self, is_first: bool) -> dict[str, Any]:
        """What is told of a step: seconds by the clock and of all threads for each block, and of products so far."""
        told = {"blocks_s": self._taken_s, "between_s": self.between.compute_s if self.between else (0.0, 0.0)}
        self._taken_s = []
        if is_first and self.between:
            self.between.begin_anew()
        return told

    def watch(self) -> None:
        """From now on look at both clocks before and after every block."""
        brought_in = ReadAhead.brought_in

        @contextlib.contextmanager
        def watched(ahead: ReadAhead, number: int) -> Iterator[None]:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            with brought_in(ahead, number):
                yield
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            if self.between is not None:
                cpu_s += self.between.make_one(lambda: _thread_s(ahead._thread))
            self._taken_s.append((wall_s, cpu_s))

        ReadAhead.brought_in = watched  # type: ignore[method-assign, assignment]


def _thread_s(thread: threading.Thread) -> float:
    """CPU seconds of a thread so far."""
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def report_on_the_way(report: Path, moved: Moved, host: Host, blocks: Blocks) -> None:
    """Write REPORT ahead of the event that ends the stage: whoever reads that closes stdin, and the process ends."""
    send = Events.send

    def telling(self: Events, event: str, **fields: Any) -> None:
        if event in ("done", "error"):
            report.write_text(json.dumps(peaks()))
        if event == "step":
            fields |= {"moved_bytes": moved.bytes, "pinned_bytes": moved.pinned_bytes, "host": asdict(host)}
            fields |= blocks.end_step(fields["step"] <= fields["together"])
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
