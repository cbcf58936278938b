"""Plans a sample job for the device at hand, and says before prompts are encoded whether any plan fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import psutil
import torch

from fluxsplit import checkpoint
from fluxsplit.attention import has_fused_attention
from fluxsplit.checkpoint import Part
from fluxsplit.defaults import steps_of
from fluxsplit.device import DTYPE_NAMES, device_info, pick_device, pick_dtype
from fluxsplit.events import Events
from fluxsplit.jobs import SampleJob
from fluxsplit.memory import DeviceInfo, budget_bytes
from fluxsplit.memory_plan import MemoryPlan, plan_memory, smaller_budget
from fluxsplit.model_sizes import Model, read_model
from fluxsplit.rates import with_file_rates, with_rates
from fluxsplit.work import Work, tokens_of, work_of

WORTH_MEASURING_BYTES = 1 << 29
"""Blocks of this size take seconds a step; what is smaller is over before it could be predicted."""


def pick_device_and_dtype(job: SampleJob) -> tuple[torch.device, torch.dtype]:
    """What a job asks for by name, or leaves to us; raises UsageError where the device is not there."""
    device = pick_device(job.device)
    parts = checkpoint.describe(job.files.transformer).parts
    return device, pick_dtype(job.dtype, device, parts["transformer"].parameters)


def check_fits(job: SampleJob) -> None:
    """Raise UsageError where the budget is too small for any plan, before minutes are spent on what comes first.

    A text that is not encoded yet counts with T5's shortest. Nothing is measured. RAM that this process has is free by
    the time the job runs; a card's is not more free then, as each process has a context of its own.
    """
    device, dtype = pick_device_and_dtype(job)
    task = _task(job, checkpoint.part(job.files.transformer, "transformer"), device, dtype)
    info = task.device
    if info.kind == "cpu" or info.unified:
        info = replace(info, free_bytes=info.free_bytes + psutil.Process().memory_info().rss)
    plan_memory(task.model, task.work, info, budget_bytes(job.vram, info), DTYPE_NAMES[dtype])


def plan_job(job: SampleJob, part: Part, device: torch.device, dtype: torch.dtype) -> MemoryPlan:
    """The plan of a job on this device as it is now; raises UsageError where the budget is too small for it."""
    task = _task(job, part, device, dtype)
    model, work, info = task.model, task.work, task.device
    weight_bytes = sum(block.bytes for block in model.blocks)
    if weight_bytes >= WORTH_MEASURING_BYTES:
        tokens = max(tokens_of(width, height, work.text_tokens) for width, height in work.sizes)
        float8 = any(block.elements for block in model.blocks)
        info = with_rates(info, device, dtype, model.hidden, model.head, tokens, float8=float8)
        info = with_file_rates(info, part.path, weight_bytes)
    if device.type != "cpu":  # the libraries that measuring loaded have taken of what was free
        info = replace(info, free_bytes=device_info(device).free_bytes)
    return plan_memory(model, work, info, budget_bytes(job.vram, info, again=bool(job.retried)), DTYPE_NAMES[dtype])


def tell_plan(plan: MemoryPlan, events: Events) -> None:
    """The plan as an event, with the fields of the job that a next try is to have in case memory runs out."""
    smaller = smaller_budget(plan)
    again = None if smaller is None else {"vram": str(smaller), "retried": plan.text()}
    events.send("plan", **asdict(plan), text=plan.text(), smaller=again)


@dataclass(frozen=True, slots=True)
class _Task:
    """What a plan is made for."""

    model: Model
    work: Work
    device: DeviceInfo


def _task(job: SampleJob, part: Part, device: torch.device, dtype: torch.dtype) -> _Task:
    model = read_model(part, DTYPE_NAMES[dtype])
    config = checkpoint.describe(job.files.transformer).config
    work = work_of(job.images, steps_of(checkpoint.variant_of(part), config))
    info = device_info(device)
    if not has_fused_attention(device, dtype, model.head):  # tried: a table of cards knows too little
        info = replace(info, fused_attention=False)
    return _Task(model, work, info)
