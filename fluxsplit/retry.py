"""A stage that runs out of memory gets a second process with a smaller plan, once.

The transformer's pictures advance together, and its plan holds for all: its stage says beforehand what a smaller
one is. The VAE's items come one after another, each with a plan of its own size: its job counts how often one did
not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from fluxsplit.errors import OutOfMemory
from fluxsplit.executor import StageProcess
from fluxsplit.jobs import DecodeJob, EncodeJob, Job, SampleJob


def events_with_retry(process: StageProcess, job: SampleJob, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
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
        images = _left(job.images, done)
        if smaller is None or not images:
            raise
        process.close()
        note(f"{error.message}; trying once more with {_described(smaller)}")
    with StageProcess(process.stage) as second:
        second.submit(replace(job, images=images, **smaller))
        yield from second.events()


def vae_events_with_retry(
    process: StageProcess, job: DecodeJob | EncodeJob, note: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The same for a stage of the VAE; its events of progress, named as the stage, tell how many items are `done`."""
    process.submit(job)
    done = 0
    try:
        for event in process.events():
            done = int(event["done"]) if event["event"] == process.stage else done
            yield event
        return
    except OutOfMemory as error:
        if job.smaller:
            raise
        process.close()
        note(f"{error.line()}; trying once more with a smaller plan")
    if isinstance(job, DecodeJob):
        rest: Job = replace(job, latents=job.latents[done:], parents=job.parents[done:], smaller=1)
    else:
        rest = replace(job, images=job.images[done:], smaller=1)
    with StageProcess(process.stage) as second:
        second.submit(rest)
        yield from second.events()


def _left(items: tuple[Any, ...], done: set[int]) -> tuple[Any, ...]:
    return tuple(item for number, item in enumerate(items) if number not in done)


def _described(smaller: dict[str, Any]) -> str:
    budget = str(smaller.get("vram", ""))
    return f"a budget of {int(budget) / 1e9:.2f} GB" if budget.isdigit() else "a smaller plan"
