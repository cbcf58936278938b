"""Weights on a CPU: computed from the page cache as they are mapped, asked for ahead, given back where RAM is short.

Copying what is in the page cache already into memory of our own would cost as much memory again and time on top. A
thread has the kernel read the next blocks instead and maps their pages, so that the computation meets no fault.
Where the plan says that not all blocks fit into RAM, the pages of those that do not are given back after use: the
kernel would otherwise throw out the least recently used ones, which in a cycle are the very next ones needed.
With them goes what lies round them (`file_spans`).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from itertools import chain

from torch import nn

from fluxsplit.errors import FluxsplitError
from fluxsplit.file_spans import Span, joined_spans, with_surroundings
from fluxsplit.memory_plan import BLOCKS_AHEAD
from fluxsplit.streaming import Layout, OnRead, layout
from fluxsplit.weights import WeightFiles


class ReadAhead:
    """A loader for blocks whose matrices are views of a map."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        files: WeightFiles,
        streamed: frozenset[int],
        on_read: OnRead,
        *,
        kept: Sequence[Span] = (),
        once: bool = False,
    ) -> None:
        """`streamed` are the blocks that do not stay in the page cache; `on_read` is told what is asked for.

        Of what lies round those, `kept` stays, as other blocks do. With `once` nothing is asked for ahead of a next
        pass.
        """
        self._files, self._streamed, self._on_read, self._once = files, streamed, on_read, once
        self._spans = [spans(layout(block)) for block in blocks]
        needed = [*chain.from_iterable(self._spans), *kept]
        self._given_back = {number: with_surroundings(self._spans[number], needed) for number in streamed}
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._asked: set[int] = set()
        self._seen: set[int] = set()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="weights reader", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def brought_in(self, number: int) -> Iterator[None]:
        """While it is entered, block `number` can be computed; the next two are asked for.

        Raises FluxsplitError where the file is not the one that was opened, or the reader has ended.
        """
        self._files.check_unchanged()
        for following in range(number, number + BLOCKS_AHEAD + 1):
            if following < len(self._spans) or not self._once:
                self._ask(following % len(self._spans))
        if self._failure is not None or not self._thread.is_alive():
            raise _ended(self._failure)
        yield
        self._asked.discard(number)
        if number in self._streamed:
            for span in self._given_back[number]:
                self._files.open(span.path).give_back(span.start, span.stop)
        else:
            self._seen.add(number)

    def close(self) -> None:
        """End the thread."""
        self._wanted.put(None)
        self._thread.join(timeout=30)

    def _ask(self, number: int) -> None:
        if number not in self._asked and number not in self._seen:
            self._asked.add(number)
            self._wanted.put(number)

    def _read(self) -> None:
        try:
            while (number := self._wanted.get()) is not None:
                for span in self._spans[number]:
                    self._files.open(span.path).map_pages(span.start, span.stop, alone=number in self._streamed)
                self._on_read(sum(span.bytes for span in self._spans[number]))
        except BaseException as error:  # told to the computation, which looks before each block
            self._failure = error


def spans(layout: Layout) -> list[Span]:
    """Where the block lies, neighbours joined."""
    return joined_spans(place.span for place in layout.places)


def _ended(failure: BaseException | None) -> FluxsplitError:
    if isinstance(failure, FluxsplitError):
        return failure
    how = f" by {type(failure).__name__} {failure}".rstrip() if failure is not None else ""
    return FluxsplitError(f"the thread that reads the weights was ended{how}", "run it again with --debug")
