"""A ring of device memory that blocks take places in, in turn, and leave in the same order.

Whoever takes a place must wait on the device for the last computation that used any of it (`after`). As computations
end in the order in which they began, that is the latest one among all whose places were given away so far: a place
may lie in the rest of one of which another block has taken the beginning.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch


@dataclass(slots=True, eq=False)
class Place:
    """Memory of the ring that one block has."""

    start: int
    memory: torch.Tensor
    """uint8."""
    after: torch.cuda.Event | None
    """When it may be written to; None for at once."""
    is_left: bool = False
    used: torch.cuda.Event | None = None
    """When what was computed from it has ended; None where there are no streams."""

    def leave(self, used: torch.cuda.Event | None) -> None:
        """Let others have it, after `used`."""
        self.is_left, self.used = True, used


class Ring:
    """Places in `memory`, uint8."""

    def __init__(self, memory: torch.Tensor, after: torch.cuda.Event | None = None) -> None:
        """`after` is when the memory may be written to at first: what the allocator hands out may still be in use."""
        self._memory = memory
        self._places: deque[Place] = deque()
        """Those that no other has been put upon, the oldest first."""
        self._end = 0
        """Of the newest."""
        self._after = after

    def take(self, count: int) -> Place | None:
        """The next `count` bytes; None while somebody has not left them."""
        start = self._end if self._end + count <= len(self._memory) else 0
        given = 0
        for place in self._places:
            if not len(place.memory) and place.is_left:
                given += 1
                continue
            passed_over = start < self._end <= place.start
            if not passed_over and not (place.start < start + count and start < place.start + len(place.memory)):
                break
            if not place.is_left:
                return None
            given += 1
        if count > len(self._memory):
            return None
        for _ in range(given):
            self._after = self._places.popleft().used
        place = Place(start, self._memory[start : start + count], self._after)
        self._places.append(place)
        self._end = start + count
        return place
