"""Measures ways from the page cache to a graphics card, alone and beside a thread that launches kernels.

    python scripts/synthetic_checkpoint.py /tmp/schnell.safetensors       # or any large file that fits RAM
    python scripts/bench_feed.py /tmp/schnell.safetensors

Each way copies 4 GB of the file to pinned RAM and from there to the card. What computes launches kernels from Python,
thousands for each step; the second pair of figures is how both fare together. Without a card nothing is launched and
the copies end in RAM. Every way is one JSON line; before them, on a card, is what it costs whoever computes to begin
things.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fluxsplit.background_reads import Read, Reads, ThreadReads, reads_by
from fluxsplit.file_spans import Span
from fluxsplit.pinned import FilePins, pinned_ram
from fluxsplit.weights import WeightFiles

MIB = 1 << 20
TORCHS = ((16, 32, 3), (14, 32, 3), (12, 32, 3), (8, 32, 3), (8, 16, 6))
"""Threads of torch's, MiB of a piece, pieces."""
READS = ((4, 16), (6, 16), (8, 16), (6, 32))
"""Threads that read, MiB of a piece, of which there are twice as many."""
WINDOW_BYTES = 256 * MIB
ROUNDS, BEGUN = 6, 400

Way = Callable[[int], None]
"""Brings in so many bytes."""


class Feed:
    """A file whose bytes are in the page cache, and where they go."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.files = WeightFiles()
        self.file, self.path = self.files.open(str(path)), str(path)
        self.there = torch.empty(WINDOW_BYTES, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, memory: torch.Tensor) -> torch.cuda.Event | None:
        """Begin the copy to the card; what it returns happens when that has ended."""
        if self.stream is None:
            return None
        with torch.cuda.stream(self.stream):
            self.there[: len(memory)].copy_(memory, non_blocking=True)
            sent = torch.cuda.Event(blocking=True)
            sent.record(self.stream)
        return sent

    def by_torchs_threads(self, threads: int, piece_bytes: int, pieces: int) -> Way:
        """One thread, whose copies out of the map torch spreads over `threads` of its own."""
        ring = [pinned_ram(piece_bytes) for _ in range(pieces)]

        def work(count: int) -> None:
            torch.set_num_threads(threads)
            sent: list[torch.cuda.Event | None] = [None] * pieces
            for number, start in enumerate(range(0, count, piece_bytes)):
                at = number % pieces
                _wait(sent[at])
                ring[at].copy_(self.file.bytes_at(start, start + piece_bytes))
                sent[at] = self.send(ring[at])

        return lambda count: _together([lambda: work(count)])

    def by_reads(self, reads: Reads, piece_bytes: int, pieces: int) -> Way:
        """As the product's reader does: whoever computes begins reads of pieces, and sends those that have ended."""
        ring = [pinned_ram(piece_bytes) for _ in range(pieces)]

        def bring(count: int) -> None:
            sent: list[torch.cuda.Event | None] = [None] * pieces
            under_way: deque[tuple[int, Read]] = deque()
            for number, start in enumerate(range(0, count, piece_bytes)):
                if number >= pieces:
                    self._send_first(under_way, ring, sent)
                _wait(sent[number % pieces])
                under_way.append((number % pieces, reads.begin(self.file, start, ring[number % pieces])))
            while under_way:
                self._send_first(under_way, ring, sent)

        return lambda count: _together([lambda: bring(count)])

    def _send_first(
        self, under_way: deque[tuple[int, Read]], ring: list[torch.Tensor], sent: list[torch.cuda.Event | None]
    ) -> None:
        at, read = under_way.popleft()
        read.wait()
        sent[at] = self.send(ring[at])

    def pinned(self, count: int) -> tuple[FilePins, Way | None]:
        """The file's own pages, which the card fetches by itself; None where the driver refuses. To be closed."""
        pins, spans = FilePins(self.files), _spans(self.path, count)
        if not pins.add(spans):
            return pins, None

        def bring(_: int) -> None:
            for span in spans:
                for part in pins.parts(span) or ():
                    self.send(part)

        return pins, bring


class Launches(threading.Thread):
    """Launches small kernels until it is stopped."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(daemon=True)
        self.count, self.stopped = 0, False
        self._values = torch.zeros(1024, device=device)

    def run(self) -> None:
        """Wait for the card now and then, or its queue would hold the launches back."""
        while not self.stopped:
            for _ in range(1000):
                self._values.add_(1)
            self.count += 1000
            torch.cuda.current_stream().synchronize()


def measured(feed: Feed, bring: Way, count: int, device: torch.device) -> dict[str, Any]:
    """GB/s alone; beside launches as well, and how many of these there were a second."""
    bring(count // 4)
    found: dict[str, Any] = {"gb_per_s": _rate(feed, bring, count)}
    if device.type == "cuda":
        launches = Launches(device)
        launches.start()
        time.sleep(0.1)
        before, started_s = launches.count, time.perf_counter()
        found["beside_launches_gb_per_s"] = _rate(feed, bring, count)
        found["launches_per_s"] = round((launches.count - before) / (time.perf_counter() - started_s))
        launches.stopped = True
        launches.join()
    return found


def host_costs(device: torch.device) -> dict[str, float]:
    """Microseconds to launch a kernel, begin a copy, change to a stream and record an event."""
    values, here = torch.zeros(1024, device=device), pinned_ram(4096)
    there, stream = torch.empty(4096, dtype=torch.uint8, device=device), torch.cuda.Stream(device)
    event = torch.cuda.Event()

    def change() -> None:
        with torch.cuda.stream(stream):
            pass

    begun: dict[str, Callable[[], object]] = {
        "launch_us": lambda: values.add_(1),
        "copy_us": lambda: there[:4000].copy_(here[:4000], non_blocking=True),
        "stream_us": change,
        "record_us": lambda: event.record(stream),
    }
    return {name: round(_begin_s(begin) * 1e6, 2) for name, begin in begun.items()}


def _begin_s(begin: Callable[[], object]) -> float:
    """Seconds until it is begun, of the quickest of some rounds, each short enough for the card's queue."""
    best_s = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        for _ in range(BEGUN):
            begin()
        best_s = min(best_s, (time.perf_counter() - started_s) / BEGUN)
    return best_s


def ways(feed: Feed, count: int) -> Iterator[tuple[str, Way]]:
    """All ways with what they are called."""
    for threads, mib, pieces in TORCHS:
        yield f"{threads} of torch's, {pieces} pieces of {mib} MiB", feed.by_torchs_threads(threads, mib * MIB, pieces)
    for threads, mib in READS:
        for name, reads in (("the C library's", reads_by(threads)), ("Python's", ThreadReads(threads))):
            yield (
                f"{threads} of {name}, {2 * threads} pieces of {mib} MiB",
                feed.by_reads(reads, mib * MIB, 2 * threads),
            )
            reads.close()
    if feed.stream is not None and torch.version.hip is None:
        started_s = time.perf_counter()
        pins, bring = feed.pinned(count)
        took_s = time.perf_counter() - started_s
        if bring is not None:
            yield f"pinned in the page cache ({took_s / count * 1e9:.3f} s a GB)", bring
        pins.close()


def _rate(feed: Feed, bring: Way, count: int) -> float:
    started_s = time.perf_counter()
    bring(count)
    if feed.stream is not None:
        feed.stream.synchronize()
    return round(count / (time.perf_counter() - started_s) / 1e9, 1)


def _spans(path: str, count: int) -> list[Span]:
    return [Span(path, start, start + WINDOW_BYTES) for start in range(0, count, WINDOW_BYTES)]


def _wait(sent: torch.cuda.Event | None) -> None:
    if sent is not None:
        sent.synchronize()


def _together(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Parse the command line, measure every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gb", type=float, default=4)
    args = parser.parse_args()
    device = torch.device(args.device)
    most_bytes = min(args.path.stat().st_size, int(args.gb * 1e9))
    count = most_bytes // WINDOW_BYTES * WINDOW_BYTES
    if not count:
        parser.error(f"{args.path} is smaller than {WINDOW_BYTES // MIB} MiB")
    feed = Feed(args.path, device)
    feed.file.map_pages(0, count)
    if device.type == "cuda":
        print(json.dumps(host_costs(device)), flush=True)
    for name, bring in ways(feed, count):
        print(json.dumps({"way": name} | measured(feed, bring, count, device)), flush=True)


if __name__ == "__main__":
    main()
