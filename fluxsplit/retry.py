"""A stage that runs out of memory gets a second process with a smaller plan, once.

What a smaller plan is only the stage knows: its event `plan` says in words what it is about to do, and by `smaller`
which fields of its job to change if that does not hold. So it is known also where the system killed it without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fluxsplit.errors import OutOfMemory
from fluxsplit.executor import StageProcess
from fluxsplit.jobs import DecodeJob, EncodeJob, Job, SampleJob, UpscaleJob


def events_with_retry(process: StageProcess, job: Job, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Hand `process` its job and yield its events; if it runs out of memory, those of a second process with less.

    Items that are finished are not done again. Raises OutOfMemory, with the plan that did not hold, where there is
    nothing smaller, or that runs out too.
    """
    said = _Said()
    process.submit(job)
    try:
        for event in process.events():
            said.take(event)
            yield event
        return
    except OutOfMemory as error:
        told = said.explained(error)
        rest = _rest(job, said)
        if rest is None:
            raise told from error
        process.close()
        note(f"{told.message}; trying once more with {_described(said.smaller or {})}")
    said = _Said()
    with StageProcess(process.stage) as second:
        second.submit(rest)
        try:
            for event in second.events():
                said.take(event)
                yield event
        except OutOfMemory as error:
            raise said.explained(error) from error


@dataclass(slots=True)
class _Said:
    """What a stage has said of its plan, and of the items that it is done with."""

    plan: str = ""
    smaller: dict[str, Any] | None = None
    numbers: set[int] = field(default_factory=set)
    """Of pictures that advance together."""
    done: int = 0
    """Of the VAE's items, one of which may have several results."""
    ended: int = 0
    """Of the upscaler's."""

    def take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "plan":
            self.plan, self.smaller = str(event.get("text", "")), event.get("smaller")
        elif kind in ("result", "failed") and "number" in event:
            self.numbers.add(event["number"])
        elif kind in ("decode", "encode"):
            self.done = int(event["done"])
        elif kind in ("result", "failed"):
            self.ended += 1

    def explained(self, error: OutOfMemory) -> OutOfMemory:
        """The error with the plan, which a stage that was killed could not tell."""
        if not self.plan or self.plan in error.message:
            return error
        told = type(error)(f"{error.message}; its plan was {self.plan}", error.hint)
        told.__notes__ = list(getattr(error, "__notes__", []))
        return told


def _rest(job: Job, said: _Said) -> Job | None:
    """The job of the second process; None where there is nothing smaller, or nothing left to do."""
    if said.smaller is None:
        return None
    smaller: Any = replace(job, **said.smaller)
    if isinstance(smaller, SampleJob):
        images = tuple(image for number, image in enumerate(smaller.images) if number not in said.numbers)
        return replace(smaller, images=images) if images else None
    if isinstance(smaller, DecodeJob):
        return replace(smaller, latents=smaller.latents[said.done :])
    if isinstance(smaller, EncodeJob | UpscaleJob):
        done = said.ended if isinstance(smaller, UpscaleJob) else said.done
        return replace(smaller, images=smaller.images[done:])
    everything: Job = smaller  # of the text, whose results come at its end
    return everything


def _described(smaller: dict[str, Any]) -> str:
    budget = str(smaller.get("vram", ""))
    if budget.isdigit():
        return f"a budget of {int(budget) / 1e9:.2f} GB"
    return "the CPU" if smaller.get("device") == "cpu" else "a smaller plan"
