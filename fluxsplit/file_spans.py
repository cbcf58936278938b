"""Bytes of files from one place to another, joined and widened.

Where RAM is short a block's bytes are given back once they are used. With them goes what lies round them and is no part
of a step, modulations and biases: the kernel forgets a large page only whole, and an older one reads further than it is
asked to. Otherwise each block left up to 28 MB behind, all of them a gigabyte that the plan knows nothing of, for which
the kernel threw out blocks that should have stayed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

READ_TOO_FAR_BYTES = 32 << 20
"""A kernel that reads further than it is asked to went on for 28 MB at most, with a disk's readahead of 8 MB."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes start..stop of a file."""

    path: str
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        """How many there are."""
        return self.stop - self.start


def with_surroundings(spans: Sequence[Span], needed: Sequence[Span]) -> list[Span]:
    """The spans, each widened to the nearest of `needed` on either side, at most 32 MiB each way."""
    found = []
    for span in spans:
        others = [other for other in needed if other.path == span.path]
        before = [other.stop for other in others if other.stop <= span.start]
        behind = [other.start for other in others if other.start >= span.stop]
        first = max([0, span.start - READ_TOO_FAR_BYTES, *before])
        last = min([span.stop + READ_TOO_FAR_BYTES, *behind])
        found.append(Span(span.path, first, last))
    return joined_spans(found)


def joined_spans(spans: Iterable[Span]) -> list[Span]:
    """In the order of the file, those that touch or overlap as one."""
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.path, span.start)):
        last = joined[-1] if joined else None
        if last is not None and last.path == span.path and last.stop >= span.start:
            joined[-1] = replace(last, stop=max(last.stop, span.stop))
        else:
            joined.append(span)
    return joined
