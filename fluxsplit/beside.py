"""One thread beside the computation, whose result nobody waits for once that has failed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def thread_beside() -> Iterator[ThreadPoolExecutor]:
    """An executor of one thread, waited for at the end; not where the block raises.

    Hashing 12 GB takes a minute from a slow disk: an error is to be told before, and the card to be free for the next
    try. The stage's process ends without waiting for threads.
    """
    executor = ThreadPoolExecutor(max_workers=1)
    try:
        yield executor
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    executor.shutdown()
