"""Places in a ring: none is given while somebody has any of it, nor before the last use of each of its bytes."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest
import torch

from fluxsplit.ring import Place, Ring


@pytest.mark.parametrize("seed", range(30))
def test_no_byte_has_two_owners_and_each_is_waited_for(seed: int) -> None:
    """Blocks of many sizes, left in order, as late as the lot has it; a use is a number, later ones being larger."""
    lots = random.Random(seed)
    size = lots.choice([10, 16, 23])
    ring = Ring(torch.zeros(size, dtype=torch.uint8))
    owner: list[Place | None] = [None] * size
    last_use, uses = [0] * size, 0
    held: deque[tuple[Place, range]] = deque()
    for _ in range(500):
        count = lots.randint(1, size // 2)
        place = ring.take(count)
        if place is None or lots.random() < 0.4:
            for _ in range(len(held) if place is None else min(1, len(held))):
                left, those = held.popleft()
                uses += 1
                used: Any = uses
                left.leave(used)
                for at in those:
                    last_use[at], owner[at] = uses, None
        if place is None:
            place = ring.take(count)
            assert place is not None, "everybody has left"
        bytes_ = range(place.start, place.start + count)
        after: Any = place.after
        assert all(owner[at] is None for at in bytes_)
        assert (after or 0) >= max(last_use[at] for at in bytes_)
        for at in bytes_:
            owner[at] = place
        held.append((place, bytes_))


def test_a_place_of_no_bytes_hides_no_other() -> None:
    ring = Ring(torch.zeros(20, dtype=torch.uint8))
    first, nothing, second = ring.take(10), ring.take(0), ring.take(10)
    assert first is not None and nothing is not None and second is not None
    first.leave(None)
    nothing.leave(None)
    assert ring.take(10) is not None and ring.take(10) is None, "the second has not left"


def test_the_first_place_waits_for_who_had_the_memory_before() -> None:
    event: Any = object()
    place = Ring(torch.zeros(20, dtype=torch.uint8), event).take(5)
    assert place is not None and place.after is event


def test_two_of_the_largest_fit_and_what_is_too_large_does_not() -> None:
    ring = Ring(torch.zeros(20, dtype=torch.uint8))
    first, second = ring.take(10), ring.take(10)
    assert first is not None and second is not None and ring.take(1) is None
    first.leave(None)
    third = ring.take(5)
    assert third is not None and third.memory.data_ptr() == first.memory.data_ptr()
    assert ring.take(6) is None, "the second has not left yet"
    assert ring.take(21) is None and Ring(torch.zeros(0, dtype=torch.uint8)).take(1) is None
