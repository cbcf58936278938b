"""Carries the plan of a sample job out: who brings which blocks where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fluxsplit.attention import use_attention
from fluxsplit.device import keep_within
from fluxsplit.events import Events
from fluxsplit.memory_plan import ONCE_PIECE_BYTES, MemoryPlan
from fluxsplit.read_ahead import ReadAhead
from fluxsplit.stored_layers import StoredLinear
from fluxsplit.streaming import Streaming
from fluxsplit.transformer import Flux
from fluxsplit.weights import WeightFiles


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
        kept = [child.span for child in flux.module.modules() if isinstance(child, StoredLinear) and child.span]
        return Placed(
            ReadAhead(flux.blocks, files, frozenset(plan.streamed), told.read, kept=kept),
            lambda: ReadAhead(matrices, files, fleeting, told.read, kept=kept, once=True),
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
