"""A stage that runs out of memory gets a second process with a smaller plan, once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from fluxsplit.errors import OutOfMemory
from fluxsplit.executor import StageProcess
from fluxsplit.jobs import DecodeJob, Job, SampleJob


def events_with_retry(process: StageProcess, job: Job, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Hand `process` its job and yield its events; if it runs out of memory, those of a second process with less.

    What to change in the job the stage itself says beforehand, by `smaller` in its event `plan`, so that it is known
    also where the system killed it. Items that have a `result` or `failed` event already, by `number`, are not done
    again. Raises OutOfMemory where there is nothing smaller, or that runs out too.
    """
    process.submit(job)
    smaller: dict[str, Any] | None = None
    done: set[int] = set()
    try:
        for event in process.events():
            if event["event"] == "plan":
                smaller = event.get("smaller")
            if event["event"] in ("result", "failed") and "number" in event:
                done.add(event["number"])
            yield event
        return
    except OutOfMemory as error:
        rest = without(job, done)
        if smaller is None or rest is None:
            raise
        process.close()
        note(f"{error.message}; trying once more with {_described(smaller)}")
    with StageProcess(process.stage) as second:
        second.submit(replace(rest, **smaller))
        yield from second.events()


def without(job: Job, done: set[int]) -> Job | None:
    """The job without the items of these numbers; None where nothing is left or it is not of a kind that is retried."""
    if isinstance(job, SampleJob):
        images = _left(job.images, done)
        return replace(job, images=images) if images else None
    if isinstance(job, DecodeJob):
        latents = _left(job.latents, done)
        return replace(job, latents=latents, parents=_left(job.parents, done)) if latents else None
    return None


def _left(items: tuple[Any, ...], done: set[int]) -> tuple[Any, ...]:
    return tuple(item for number, item in enumerate(items) if number not in done)


def _described(smaller: dict[str, Any]) -> str:
    budget = str(smaller.get("vram", ""))
    return f"a budget of {int(budget) / 1e9:.2f} GB" if budget.isdigit() else "a smaller plan"
