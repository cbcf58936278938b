"""Work is shared out so that a slow thread does less of it, and all of it is done."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest

from fluxsplit.machine_code import pieces_of, share_out


def test_a_thread_that_is_slow_leaves_the_rest_to_others() -> None:
    begun, others_done, done = threading.Event(), threading.Event(), list[tuple[int, int]]()

    def run(thread: int, piece: int) -> None:
        if thread == 0:  # the thread that asked
            begun.set()
            assert others_done.wait(60)
        assert begun.wait(60)
        done.append((thread, piece))
        if len(done) == 9:
            others_done.set()

    share_out(run, [(number,) for number in range(10)], 3)
    assert sorted(piece for _, piece in done) == list(range(10))
    assert [thread for thread, _ in done].count(0) == 1


def test_an_error_in_any_thread_is_raised_when_all_have_ended() -> None:
    done = list[int]()

    def run(thread: int, piece: int) -> None:
        if piece == 1:
            raise ArithmeticError
        done.append(piece)

    with pytest.raises(ArithmeticError):
        share_out(run, [(number,) for number in range(6)], 2)
    assert sorted(done) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [1, 32, 33, 320, 3072, 3100, 12288])
@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_pieces_are_all_there_is_and_become_smaller(count: int, threads: int) -> None:
    pieces = pieces_of(count, threads, 32, 128, 1024)
    assert pieces[0][0] == 0 and pieces[-1][1] == count
    assert all(before[1] == after[0] for before, after in pairwise(pieces))
    sizes = [last - first for first, last in pieces]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size % 32 == 0 for size in sizes[:-1]) and max(sizes) <= 1024
    if threads == 1:
        assert len(pieces) == -(-count // 1024)
    else:
        assert len(pieces) >= min(threads, -(-count // 32)) / 2
        assert max(sizes) <= max(128, count / threads), "none has more than its equal share, but for the least"
