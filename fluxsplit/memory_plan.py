"""What stays, what streams and how long a step takes, worked out from sizes before anything is loaded.

On a card, a budget pays first for what every run needs: small weights, the scratch matrix, the activations of the
largest picture, the hidden states of the pictures that advance together. What is left holds blocks. If not all of
them fit, two slots take their turns instead, and single blocks stream before double ones: they are smaller, so that
the slots are, and do more work for each byte, so that there is more to hide the transfer behind. Those that stream
are spread evenly among those that stay, for the same reason.

On a CPU the blocks are in the page cache, which costs none of the budget. `resident` are those that fit into the RAM
that the budget leaves; the pages of the others are given back after use, so that they do not push those out.

What a run holds besides blocks is `held_memory`'s to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fluxsplit.errors import UsageError
from fluxsplit.held_memory import held_memory
from fluxsplit.memory import PINNED_SHARE, DeviceInfo
from fluxsplit.model_sizes import Model
from fluxsplit.work import Work, tokens_of

MAX_TOGETHER = 16
"""Pictures in one pass: with so many, what is streamed hardly counts any more."""
PIECE_BYTES, ONCE_PIECE_BYTES = 16 << 20, 8 << 20
"""Pinned RAM of each thread that reads, for a card's blocks and before the steps; powers of two, as torch makes it."""
MAX_READERS, OTHERS = 8, 2
"""Threads that read for a card, at most, and cores that are left to who computes and to the system."""
ALIGN_BYTES = 256
"""Every block's memory on a card, and every matrix's in it, begins at a multiple of this."""
PINNABLE_SHARE = 0.5
"""Of what streams: reading then has twice the time for each byte, and no model is pinned whole."""
PIECES = 2
"""Of each reader, at least: the card fetches one while the other is filled."""
LEFT_ALONE = 0.02
"""Of a budget, where what it leaves lets blocks come further ahead."""
STAGED_BLOCKS = 3
"""For which there is pinned RAM: one is read while the card fetches another, and one more for the blocks that take the
bus longer than they take to be computed, which come one after the other."""
FRAGMENTED = 0.06
"""What torch's allocator reserves besides what it is asked for, as a share of it, where its segments cannot grow: 13.26
GB for a plan of 12.64, measured on an H200."""
CACHE_MARGIN = 0.95
BLOCKS_AHEAD = 2
"""That a CPU has read before it comes to them."""
ELEMENTWISE, CARD_ELEMENTWISE = 8.0, 4.0
"""Times through what `rates` measures, for each token and channel of a block; fitted, a card's to an H200."""
MLP_RATIO = 4
"""A block's channels in the middle of its MLP, where GELU is, over those of its states."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where everything goes, and what that costs."""

    device: str
    """`cpu`, `cuda` or `hip`."""
    budget_bytes: int
    resident: tuple[int, ...]
    """Numbers of the blocks that stay, doubles first."""
    streamed: tuple[int, ...]
    resident_bytes: int
    streamed_bytes: int
    """Moved in every pass."""
    fleeting: tuple[int, ...]
    """Of those that stream the ones for which RAM is too short: read from the disk in every pass."""
    fleeting_bytes: int
    modulation_bytes: int
    """Moved once, before the first step."""
    readers: int
    """Threads that read for a card."""
    slots: int
    """Device memory for blocks in turn; 0 where nothing is copied, 1 where reading and computing take turns."""
    slot_bytes: int
    spare_bytes: int
    """Such memory besides, of what the budget leaves: up to one slot more."""
    pieces: int
    """Pinned RAM that the copies of blocks go through, each `PIECE_BYTES`."""
    pinned_bytes: int
    """All such RAM, that of modulations included."""
    pinnable: tuple[int, ...]
    """Of those that stream the ones that may be pinned in the page cache, if copies are what a step waits for."""
    pinnable_bytes: int
    base_bytes: int
    """Libraries, small weights."""
    scratch_bytes: int
    """The expanded matrix."""
    activation_bytes: int
    state_bytes: int
    """Hidden states of the pictures that advance together."""
    query_chunk: int | None
    """Rows of attention computed at once; None where a fused kernel does it."""
    together: int
    """Pictures in one pass."""
    peak_bytes: int
    """Predicted: of the device's memory, of anonymous RAM on a CPU."""
    smallest_bytes: int
    """The smallest budget that works."""
    step_s: float | None
    """Predicted for one step of one picture, the pictures of a pass sharing what is streamed; None where unknown."""
    limit: str
    """What a step waits for: compute, bus, copies in RAM or disk; empty where unknown."""

    def text(self) -> str:
        """One line for people."""
        total = len(self.resident) + len(self.streamed)
        verb = "cached" if self.device == "cpu" else "resident"
        return (
            f"{len(self.resident)} of {total} blocks {verb}, {self.together} at once, "
            f"{self.peak_bytes / 1e9:.2f} GB of {self.budget_bytes / 1e9:.2f} GB"
        )


def plan_memory(model: Model, work: Work, device: DeviceInfo, budget_bytes: int, dtype: str) -> MemoryPlan:
    """The plan that is fastest within the budget; raises UsageError, with the smallest that works, if there is none.

    That is the one which moves the fewest bytes for each picture: one block more that streams may be worth it where
    more pictures advance together for it. Pure arithmetic: the same arguments give the same plan.
    """
    count = len(work.sizes)
    least = _plan(model, work, device, 0, dtype, 1, tuple(range(len(model.blocks))), 1)
    if least.peak_bytes > budget_bytes:
        need, given = _ceil_mb(least.peak_bytes), f"{budget_bytes // 1_000_000:,} MB"
        largest = max(work.sizes, key=lambda size: size[0] * size[1])
        raise UsageError(
            f"{largest[0]}x{largest[1]} needs at least {need:,} MB, the budget is {given}",
            f"give --vram {need}M or more, or a smaller --size"
            if least.peak_bytes <= device.free_bytes
            else f"give a smaller --size: {device.free_bytes // 1_000_000:,} MB are free",
        )
    best: MemoryPlan | None = None
    most = min(count, MAX_TOGETHER)
    for streamed, slots in _choices(model, device, budget_bytes, least):
        if best is not None and slots == 1:
            break
        for together in range(most if streamed else 1, 0, -1):
            plan = _plan(model, work, device, budget_bytes, dtype, together, streamed, slots)
            if plan.peak_bytes <= budget_bytes:
                if best is None or plan.streamed_bytes / together < best.streamed_bytes / best.together:
                    best = plan
                break
        if best is not None and (not streamed or best.together == most):
            break  # all that follow stream more
    assert best is not None, "the last choice is what the smallest budget was worked out for"
    return _with_smallest(best, least.peak_bytes)


def readers_of(device: DeviceInfo) -> int:
    """How many threads read for a card: they copy in RAM, which takes a core."""
    return max(1, min(MAX_READERS, device.processor_cores - OTHERS))


def smaller_budget(plan: MemoryPlan) -> int | None:
    """The budget to try after a plan ran out of memory; None where there is nothing left to give up."""
    target = int(min(plan.budget_bytes, plan.peak_bytes) * 0.75)
    if target >= plan.smallest_bytes:
        return target
    return plan.smallest_bytes if plan.peak_bytes > 1.02 * plan.smallest_bytes else None


def _choices(
    model: Model, device: DeviceInfo, budget_bytes: int, least: MemoryPlan
) -> Iterable[tuple[tuple[int, ...], int]]:
    """Sets of blocks that stream, the smallest first, with the number of slots."""
    if device.kind == "cpu":
        every = list(range(len(model.blocks)))
        yield _not_cached(model, device, every, BLOCKS_AHEAD + 1, min(budget_bytes, least.peak_bytes)), 0
        return
    yield (), 0
    singles = [n for n, block in enumerate(model.blocks) if block.name.startswith("single")]
    doubles = [n for n, block in enumerate(model.blocks) if block.name.startswith("double")]
    for count in range(1, len(singles) + 1):
        yield _spread(singles, count), 2
    for count in range(1, len(doubles) + 1):
        yield tuple(sorted((*singles, *_spread(doubles, count)))), 2
    yield tuple(range(len(model.blocks))), 1


def _not_cached(
    model: Model, device: DeviceInfo, numbers: Sequence[int], ahead: int, taken_bytes: int
) -> tuple[int, ...]:
    """Which of these blocks do not stay in the page cache, beside `ahead` of them that are under way.

    `taken_bytes` is RAM for other things. A cache that is too small would lose all of them instead: read round and
    round, the page that is needed next is the one that was thrown out.
    """
    free_bytes = device.free_bytes if device.kind == "cpu" else device.ram_bytes
    if free_bytes is None:
        return ()
    room = int((free_bytes - taken_bytes) * CACHE_MARGIN) - model.small_bytes
    ahead_bytes = ahead * max((model.blocks[n].bytes for n in numbers), default=0)
    for count in range(len(numbers) + 1):
        fleeting = _spread(numbers, count)
        held_bytes = sum(model.blocks[n].bytes for n in numbers if n not in fleeting)
        if held_bytes + (ahead_bytes if fleeting else 0) <= room:
            return fleeting
    return tuple(numbers)


def _spread(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the numbers, evenly spaced."""
    return tuple(numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count))


@dataclass(frozen=True, slots=True)
class _Turns:
    """What blocks that stream take turns in: a card's memory, and pinned RAM on the way there."""

    slots: int = 0
    slot_bytes: int = 0
    spare_bytes: int = 0
    readers: int = 0
    pieces: int = 0
    pinned_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Of the card's memory."""
        return self.slots * self.slot_bytes + self.spare_bytes


def _turns(model: Model, device: DeviceInfo, streamed: tuple[int, ...], slots: int, left_bytes: float) -> _Turns:
    """For these blocks, where `left_bytes` of the budget are left for it; the slots alone may be more."""
    if device.kind == "cpu":
        return _Turns()
    slot_bytes = max((model.blocks[n].bytes for n in streamed), default=0)
    slots = slots if streamed else 0
    readers, staged, spare_bytes = readers_of(device), 0, 0
    if slots > 1:
        spare_bytes = max(0, min(slot_bytes, int(left_bytes - slots * slot_bytes))) // ALIGN_BYTES * ALIGN_BYTES
        staged = -(-slot_bytes // PIECE_BYTES) * STAGED_BLOCKS
    pieces = max(readers * PIECES, staged)
    pinned_bytes = pieces * PIECE_BYTES + readers * PIECES * ONCE_PIECE_BYTES
    return _Turns(slots, slot_bytes, spare_bytes, readers, pieces, pinned_bytes)


def _plan(
    model: Model,
    work: Work,
    device: DeviceInfo,
    budget_bytes: int,
    dtype: str,
    together: int,
    streamed: tuple[int, ...],
    slots: int,
) -> MemoryPlan:
    on_cpu = device.kind == "cpu"
    resident = tuple(n for n in range(len(model.blocks)) if n not in set(streamed))
    resident_bytes = sum(model.blocks[n].bytes for n in resident)
    tokens = sorted((tokens_of(width, height, work.text_tokens) for width, height in work.sizes), reverse=True)
    held = held_memory(model, work, device, dtype, together, tokens)
    stays_bytes = held.bytes if on_cpu else held.bytes + resident_bytes
    lost_share = 0.0 if on_cpu or device.growing_segments else FRAGMENTED
    turns = _turns(model, device, streamed, slots, budget_bytes * (1 - LEFT_ALONE) / (1 + lost_share) - stays_bytes)
    lost_bytes = int((stays_bytes + turns.bytes) * lost_share)
    peak_bytes = stays_bytes + turns.bytes + lost_bytes
    of_ram = turns.pinned_bytes + (peak_bytes if device.unified else 0)
    fleeting = streamed if on_cpu else _not_cached(model, device, sorted(streamed), turns.slots, of_ram)
    pinnable = _pinnable(model, device, sorted(set(streamed) - set(fleeting))) if turns.slots > 1 else ()
    streamed_bytes, fleeting_bytes, pinnable_bytes = (
        sum(model.blocks[n].bytes for n in some) for some in (streamed, fleeting, pinnable)
    )
    moved = (streamed_bytes, streamed_bytes - pinnable_bytes, fleeting_bytes)
    step_s, limit = _step(model, tokens, work.forwards, device, moved, together)
    return MemoryPlan(
        device=device.kind,
        budget_bytes=budget_bytes,
        resident=resident,
        streamed=tuple(sorted(streamed)),
        resident_bytes=resident_bytes,
        streamed_bytes=streamed_bytes,
        fleeting=tuple(sorted(fleeting)),
        fleeting_bytes=fleeting_bytes,
        modulation_bytes=model.modulation_bytes,
        readers=turns.readers,
        slots=turns.slots,
        slot_bytes=turns.slot_bytes,
        spare_bytes=turns.spare_bytes,
        pieces=turns.pieces,
        pinned_bytes=turns.pinned_bytes,
        pinnable=pinnable,
        pinnable_bytes=pinnable_bytes,
        base_bytes=held.base_bytes + lost_bytes,
        scratch_bytes=held.scratch_bytes,
        activation_bytes=held.activation_bytes,
        state_bytes=held.state_bytes,
        query_chunk=held.query_chunk,
        together=together,
        peak_bytes=peak_bytes,
        smallest_bytes=peak_bytes,
        step_s=step_s,
        limit=limit,
    )


def _pinnable(model: Model, device: DeviceInfo, cached: Sequence[int]) -> tuple[int, ...]:
    """Which blocks may be pinned: so that in the time of each block, which is much the same, as many bytes are read."""
    if device.kind != "cuda" or device.unified:  # where RAM is the card's memory it is planned for already
        return ()
    all_bytes = sum(model.blocks[n].bytes for n in cached)
    room = min(all_bytes * PINNABLE_SHARE, (device.ram_bytes or 0) * PINNED_SHARE)
    due_bytes = float(max((model.blocks[n].bytes for n in cached), default=0))  # more is read rather than too little
    read_bytes, chosen = all_bytes - room, []
    for number in cached:
        block_bytes = model.blocks[number].bytes
        due_bytes += read_bytes / len(cached)
        if due_bytes >= block_bytes or block_bytes > room:
            due_bytes -= block_bytes
        else:
            chosen.append(number)
            room -= block_bytes
    return tuple(chosen)


def _with_smallest(plan: MemoryPlan, smallest_bytes: int) -> MemoryPlan:
    return replace(plan, smallest_bytes=smallest_bytes)


def _step(
    model: Model,
    tokens: Sequence[int],
    forwards: int,
    device: DeviceInfo,
    moved_bytes: tuple[int, int, int],
    together: int,
) -> tuple[float | None, str]:
    """Seconds of one step of one picture in a pass of `together`, and what they are spent on.

    `moved_bytes` are those that stream in a pass, those of them that have to be copied in RAM, and those that come
    from the disk.
    """
    if device.flops_per_s is None:
        return None, ""
    compute = forwards * sum(_compute_s(model, count, device) for count in tokens[:together])
    times = {"compute": compute}
    if device.bus_bytes_per_s:
        times["bus"] = moved_bytes[0] / device.bus_bytes_per_s
    if device.feed_bytes_per_s:
        times["copies in RAM"] = moved_bytes[1] / device.feed_bytes_per_s
    if device.disk_bytes_per_s and moved_bytes[2]:
        times["disk"] = moved_bytes[2] / device.disk_bytes_per_s
    limit = max(times, key=lambda name: times[name])
    return times[limit] / together, limit


def _compute_s(model: Model, tokens: int, device: DeviceInfo) -> float:
    """Products, attention, expansion, GELU and other elementwise work of one forward."""
    assert device.flops_per_s is not None
    hidden, blocks = model.hidden, len(model.blocks)
    products = 24 * hidden**2 * tokens * blocks / device.flops_per_s
    attention = 4 * tokens**2 * hidden * blocks / (device.attention_flops_per_s or device.flops_per_s)
    elements = sum(block.elements for block in model.blocks)
    expansion = elements / device.expand_elements_per_s if device.expand_elements_per_s else 0.0
    values = tokens * hidden * blocks
    activation = MLP_RATIO * values / device.gelu_per_s if device.gelu_per_s else 0.0
    times = ELEMENTWISE if device.kind == "cpu" else CARD_ELEMENTWISE
    others = times * values / device.elementwise_per_s if device.elementwise_per_s else 0.0
    return products + attention + expansion + activation + others


def _ceil_mb(count: int) -> int:
    return -(-count // 1_000_000)
