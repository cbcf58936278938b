"""A thread beside the computation is waited for, unless that failed."""

from __future__ import annotations

import threading

import pytest

from fluxsplit.beside import thread_beside


def test_what_it_does_is_finished_at_the_end() -> None:
    go = threading.Event()
    with thread_beside() as beside:
        result = beside.submit(go.wait)
        threading.Timer(0.05, go.set).start()
    assert result.done() and result.result()


def test_an_error_does_not_wait_for_it() -> None:
    go, began = threading.Event(), threading.Event()
    try:
        with pytest.raises(MemoryError), thread_beside() as beside:
            working = beside.submit(lambda: (began.set(), go.wait(60)))
            waiting = beside.submit(int)
            began.wait()
            raise MemoryError
        assert not working.done() and waiting.cancelled()
    finally:
        go.set()
