"""A card, its bus and the threads that read for it, by a clock that nobody has to wait for.

The blocks, the reader and the ring are the product's own, over a file of the true size that takes no room on a disk;
what they ask of a card, and of the C library's reads, only advances a clock. So it can be told how long a step takes on
a card of any speed, the same on every machine. What it knows: copies share the bus, each stream in its order; a thread
reads one piece after the other; launching a block's kernels takes the host a while, and it is at most three blocks
ahead of the card. What it does not: processors and memory that all of them share. At 2 GB an H200 took up to a tenth
longer (docs/performance.md).
"""

from __future__ import annotations

import bisect
import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from fluxsplit import pinned, reader
from fluxsplit.weights import WeightFile

AHEAD = 3
"""Blocks that the host may have launched before the card has computed the first of them: its queue has an end."""


@dataclass(frozen=True)
class Speed:
    """Of a machine, all its parts; the defaults are what an H200's does, as measured."""

    bus_bytes_per_s: float = 55e9
    read_bytes_per_s: float = 30e9
    """By all threads that read together."""
    thread_bytes_per_s: float = 4.2e9
    compute_s: float = 0.177
    """Of a step."""
    launch_s: float = 0.12
    """Of a step, by the host, while threads read beside it: 0.087 to 0.132."""
    pin_s_per_byte: float = 0.035e-9
    begin_s: float = 15e-6
    """To begin a read."""
    copy_s: float = 25e-6
    """To begin a copy, with changing to its stream."""
    ask_s: float = 2e-6
    """To ask about an event or a read, or to record one."""
    wake_s: float = 60e-6
    """Until who has waited goes on."""


H200 = Speed()


class Machine:
    """Takes the place of what the product uses of `torch.cuda`, of background reads and of the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speed: Speed) -> None:
        self.now_s, self.speed = 0.0, speed
        self.bus_s, self.copies = 0.0, 0
        """For which the bus was used, and how often."""
        self._busy: list[tuple[float, float]] = []
        self.compute, self._on = Stream(self), deque[Stream]()
        self._ends: deque[float] = deque([0.0] * AHEAD, AHEAD)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking=False: Event(self))
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device=None: self._on[-1] if self._on else self.compute
        )
        monkeypatch.setattr(torch.cuda, "stream", self._stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(reader, "reads_by", lambda threads: Reads(self, threads))
        monkeypatch.setattr(reader, "_copy", lambda source, filling, at: self._copy(len(source)))
        monkeypatch.setattr(pinned, "pin", self._pin)
        monkeypatch.setattr(pinned, "unpin", lambda memory: None)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)

    def wait_until(self, then_s: float) -> None:
        """What the host does when it waits."""
        if then_s > self.now_s:
            self.now_s = then_s + self.speed.wake_s

    def compute_block(self, blocks: int) -> None:
        """Launch what one of so many blocks needs; the card is not done before the last kernel was launched."""
        began_s = max(self.compute.ready_s, self.now_s)
        self.now_s = max(self.now_s + self.speed.launch_s / blocks, self._ends[0])
        self.compute.ready_s = max(began_s + self.speed.compute_s / blocks, self.now_s)
        self._ends.append(self.compute.ready_s)

    @contextlib.contextmanager
    def _stream(self, stream: Stream) -> Iterator[None]:
        self._on.append(stream)
        yield
        self._on.pop()

    def _pin(self, memory: torch.Tensor, *, read_only: bool = False) -> bool:
        self.now_s += memory.numel() * self.speed.pin_s_per_byte
        return True

    def _copy(self, count: int) -> None:
        """In the first moments that the bus has, after what the stream has to wait for."""
        self.now_s += self.speed.copy_s
        stream, left_s = self._on[-1], count / self.speed.bus_bytes_per_s
        self.bus_s, self.copies = self.bus_s + left_s, self.copies + 1
        at_s = max(stream.ready_s, self.now_s)
        self._busy = [moment for moment in self._busy if moment[1] > self.now_s]
        for begun_s, ended_s in list(self._busy):
            if begun_s > at_s and left_s > 0:
                until_s = min(begun_s, at_s + left_s)
                bisect.insort(self._busy, (at_s, until_s))
                left_s -= until_s - at_s
            if left_s > 0:
                at_s = max(at_s, ended_s)
        if left_s > 0:
            bisect.insort(self._busy, (at_s, at_s + left_s))
        stream.ready_s = at_s + max(left_s, 0.0)


class Stream:
    """When all that it was given has ended."""

    def __init__(self, machine: Machine) -> None:
        self.ready_s, self._machine = 0.0, machine

    def wait_event(self, event: Event) -> None:
        self._machine.now_s += self._machine.speed.ask_s
        self.ready_s = max(self.ready_s, event.at_s)

    def wait_stream(self, other: Stream) -> None:
        self.ready_s = max(self.ready_s, other.ready_s)


class Event:
    """A moment of a stream."""

    def __init__(self, machine: Machine) -> None:
        self.at_s, self._machine = 0.0, machine

    def record(self, stream: Stream) -> None:
        self._machine.now_s += self._machine.speed.ask_s
        self.at_s = stream.ready_s

    def query(self) -> bool:
        self._machine.now_s += self._machine.speed.ask_s
        return self.at_s <= self._machine.now_s

    def synchronize(self) -> None:
        self._machine.wait_until(self.at_s)


class Reads:
    """As the C library's: each thread does what it was given, in turn."""

    def __init__(self, machine: Machine, threads: int) -> None:
        self._machine, self._turn, self._ends_s = machine, 0, [0.0] * threads
        speed = machine.speed
        self._bytes_per_s = min(speed.thread_bytes_per_s, speed.read_bytes_per_s / threads)

    def begin(self, file: WeightFile, start: int, memory: torch.Tensor, *, alone: bool = False) -> SimulatedRead:
        self._machine.now_s += self._machine.speed.begin_s
        self._turn = (self._turn + 1) % len(self._ends_s)
        begins_s = max(self._ends_s[self._turn], self._machine.now_s)
        self._ends_s[self._turn] = begins_s + memory.numel() / self._bytes_per_s
        return SimulatedRead(self._machine, self._ends_s[self._turn])

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class SimulatedRead:
    """One that ends at a known time."""

    machine: Machine
    at_s: float

    def is_done(self) -> bool:
        self.machine.now_s += self.machine.speed.ask_s
        return self.at_s <= self.machine.now_s

    def wait(self) -> None:
        self.machine.wait_until(self.at_s)

    def drop(self) -> None:
        pass
