"""A card's streams and events on a CPU, where whatever is not forbidden happens: a race becomes a wrong byte.

Work that is given to a stream is put in its queue, and queues advance only when somebody waits, in an order that is
drawn by lot among all that the events allow; work nobody waits for comes last. Code that has forgotten an event
is right with some orders and wrong with others, so it is to be run with many. What does not go to a stream, as all that
a CPU computes, happens at once: for that the queues must be empty, which is what `at_once` is for.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

Work = Callable[[], object]


class Event:
    """Recorded at a place in a queue, it has happened when the queue has come so far."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self.mark: list[bool] = [True]

    def record(self, stream: Stream) -> None:
        mark = self.mark = [False]
        stream.give(lambda: mark.__setitem__(0, True))

    def query(self) -> bool:
        return self.mark[0]

    def synchronize(self) -> None:
        self._card.run_until(self.mark)


class Stream:
    """A queue of work and of marks to wait for."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self.queue: deque[Work | list[bool]] = deque()
        card.streams.append(self)

    def give(self, work: Work | list[bool]) -> None:
        with self._card.lock:
            self.queue.append(work)
            if self._card.at_once:
                self._card.run()

    def wait_event(self, event: Event) -> None:
        self.give(event.mark)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self._card)
        event.record(other)
        self.wait_event(event)

    def advance(self) -> bool:
        """Do the first thing in the queue, if that is allowed yet."""
        if not self.queue:
            return False
        first = self.queue[0]
        if isinstance(first, list):
            if not first[0]:
                return False
        else:
            first()
        self.queue.popleft()
        return True


class Card:
    """All streams; takes the place of what the product uses of `torch.cuda`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int = 0, *, at_once: bool = False) -> None:
        self.at_once, self.copies = at_once, 0
        self.lock = threading.RLock()
        self.streams: list[Stream] = []
        self._lots = random.Random(seed)
        self._thread = threading.local()
        self.default = Stream(self)
        self._copy = torch.Tensor.copy_
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking=False: Event(self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current())
        monkeypatch.setattr(torch.cuda, "stream", self.on)

        def copy_(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            return self.copy(to, source, non_blocking)

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)

    def current(self) -> Stream:
        """The stream that this thread gives work to."""
        return getattr(self._thread, "stream", self.default)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._thread.stream = self.current(), stream
        try:
            yield
        finally:
            self._thread.stream = before

    def copy(self, to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        """`Tensor.copy_`; one that need not be waited for is a stream's work."""
        if not non_blocking:
            return self._copy(to, source)
        self.copies += 1
        self.current().give(lambda: self._copy(to, source))
        return to

    def run_until(self, mark: list[bool]) -> None:
        """What a host that waits sees: everything else as far as it happens to be."""
        with self.lock:
            self._advance(lambda: mark[0])
            assert mark[0], "nothing can go on, and this was waited for"

    def run(self) -> None:
        """Everything, to the end."""
        with self.lock:
            self._advance(lambda: False)
            assert not any(stream.queue for stream in self.streams), "streams that wait for each other"

    def _advance(self, enough: Callable[[], Any]) -> None:
        while not enough():
            order = list(self.streams)
            self._lots.shuffle(order)
            few, many = self._lots.choice([1, 9]), self._lots.choice([1, 1000])  # one far ahead, or a little of each
            moved = sum(stream.advance() for stream in order[:few] for _ in range(many))
            if not moved and not any(stream.advance() for stream in order):
                return
