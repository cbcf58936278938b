"""Plans a sample job for the device at hand, and carries the plan out: who brings which blocks where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fluxsplit import checkpoint
from fluxsplit.attention import has_fused_attention, use_attention
from fluxsplit.checkpoint import Part
from fluxsplit.defaults import steps_of
from fluxsplit.device import DTYPE_NAMES, device_info, keep_within
from fluxsplit.events import Events
from fluxsplit.jobs import SampleJob
from fluxsplit.memory import budget_bytes
from fluxsplit.memory_plan import (
    ONCE_PIECE_BYTES,
    MemoryPlan,
    plan_memory,
    smaller_budget,
)
from fluxsplit.model_sizes import read_model
from fluxsplit.rates import with_file_rates, with_rates
from fluxsplit.read_ahead import ReadAhead
from fluxsplit.stored_layers import StoredLinear
from fluxsplit.streaming import Streaming
from fluxsplit.transformer import Flux
from fluxsplit.weights import WeightFiles
from fluxsplit.work import tokens_of, work_of

WORTH_MEASURING_BYTES = 1 << 29
"""Blocks of this size take seconds a step; what is smaller is over before it could be predicted."""


def plan_job(job: SampleJob, part: Part, device: torch.device, dtype: torch.dtype) -> MemoryPlan:
    """The plan of a job on this device as it is now; raises UsageError where the budget is too small for it."""
    model = read_model(part, DTYPE_NAMES[dtype])
    config = checkpoint.describe(job.files.transformer).config
    work = work_of(job.images, steps_of(checkpoint.variant_of(part), config))
    info = device_info(device)
    if not has_fused_attention(device, dtype, model.head):  # tried: a table of cards knows too little
        info = replace(info, fused_attention=False)
    weight_bytes = sum(block.bytes for block in model.blocks)
    if weight_bytes >= WORTH_MEASURING_BYTES:
        tokens = max(tokens_of(width, height, work.text_tokens) for width, height in work.sizes)
        info = with_rates(info, device, dtype, model.hidden, model.head, tokens)
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
class Placed:
    """Who brings what."""

    blocks: Streaming | ReadAhead
    modulations: Callable[[], Streaming | ReadAhead]
    """Makes who brings the matrices that are needed before the first step; to be closed afterwards."""


def place(plan: MemoryPlan, flux: Flux, files: WeightFiles, events: Events) -> Placed:
    """Bring what stays to where it stays, and return who brings the rest."""
    use_attention(flux.module, plan.query_chunk)
    told = _Load(events, plan.resident_bytes + plan.streamed_bytes + plan.modulation_bytes)
    matrices, every = flux.modulations.matrices, frozenset(range(len(flux.modulations.matrices)))
    if flux.device.type == "cpu":
        fleeting = every if plan.streamed else frozenset[int]()
        return Placed(
            ReadAhead(flux.blocks, files, frozenset(plan.streamed), told.read),
            lambda: ReadAhead(matrices, files, fleeting, told.read, once=True),
        )
    keep_within(plan.budget_bytes, flux.device)
    torch.set_num_threads(1)  # what is left to a CPU is small, and threads that wait for more of it would spin
    inside = {id(child) for block in flux.blocks for child in block.modules()}
    for child in flux.module.modules():
        if isinstance(child, StoredLinear) and id(child) not in inside:
            child.move(flux.device)
    blocks = Streaming(
        flux.blocks,
        files,
        flux.device,
        resident=frozenset(plan.resident),
        slots=plan.slots,
        ahead=plan.slots > 1,
        readers=plan.readers,
        pieces=plan.pieces,
        spare_bytes=plan.spare_bytes,
        fleeting=frozenset(plan.fleeting),
        pinnable=frozenset(plan.pinnable),
        on_read=told.read,
    )
    before: dict[str, Any] = {"once": True, "piece_bytes": ONCE_PIECE_BYTES, "readers": plan.readers}
    return Placed(blocks, lambda: Streaming(matrices, files, flux.device, on_read=told.read, **before))


class _Load:
    """Tells how much of the weights was read the first time through."""

    def __init__(self, events: Events, total_bytes: int) -> None:
        self._events, self._total, self._done = events, total_bytes, 0

    def read(self, count: int) -> None:
        if self._done < self._total:
            self._done = min(self._total, self._done + count)
            self._events.send("load", what="transformer", done_bytes=self._done, total_bytes=self._total)
