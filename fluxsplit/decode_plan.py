"""The plan of a picture through a VAE: how high strips are, where activations live, the peak of memory.

A plane that is read for the last time gives its rows back while the next one grows. That makes the peak a sum that is
known before anything is decoded: two planes of the first width at the picture's size, and a strip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from fluxsplit.errors import DoesNotFit
from fluxsplit.memory import DeviceInfo
from fluxsplit.vae_passes import Pass

HOMES = ("device", "ram", "disk")
"""Where planes may live, best first; `device` is RAM too where the device is the CPU. Of a card's planes as many blocks
as fit are on the card in any case."""
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BLOCK_BYTES = 8 << 20
"""Planes come in blocks of rows, no larger than this unless a row is, which are given back one by one."""
KEPT_SHARE = 0.95
"""Of what the work of strips leaves of a card, for blocks of planes: the work is an estimate."""
CPU_STRIP_BYTES = 6 << 20
"""A strip in fp32: small enough for the last-level cache, large enough that its overhead does not count."""
CARD_STRIP_BYTES = {"device": 256 << 20, "ram": 64 << 20, "disk": 64 << 20}
"""At most, by home: higher ones leave less room on the card for planes."""
MIN_STRIP_BYTES = 1 << 20
LOW_STRIP_BYTES = 16 << 20
"""A card is slower with lower strips than with some planes in RAM."""
RAM_MARGIN_BYTES = 1 << 30
"""That a card's planes leave free of RAM."""
PAGE_BYTES = 4096
"""Blocks of a card's planes are multiples of it."""
HALO_BLOCKS = 2
"""Of a plane that is given back: that of the rows which the next strip needs as well, and one that is half read."""
CPU_KEPT_BYTES = 16 << 20
"""What oneDNN and malloc hold besides, now 3 MB and now 30; measured by `scripts/bench_decode.py --plan`."""
CARD_KEPT_BYTES = 128 << 20
"""The same of torch's allocator on a card and the workspace of convolutions in 16 bits; measured on an H200."""
CARD_FP32_WORKSPACE = 1.9
"""Workspace of a card's convolutions in fp32, in strips, where that is more; measured on an H200."""

FRAGMENTED_WORK = 1.7
"""What torch's allocator reserves for a strip's work where its segments cannot grow, over what is planned: 0.62 GB for
0.37, measured on an H200 at 1152x944 in fp32."""


@dataclass(frozen=True, slots=True)
class VaePlan:
    """How one picture is decoded or encoded."""

    dtype: str
    home: str
    """Where planes live: one of `HOMES`."""
    strip_bytes: int
    """Upper bound for a strip's rows, counted in fp32."""
    device_bytes: int
    """The predicted peak on the device: a strip's work, weights of one layer, the allocator's own, planes if there."""
    planes_bytes: int
    """Planes at their largest, wherever they live; on a card in whole blocks."""
    block_bytes: int = 0
    """Of a block of any plane, on a card."""
    kept_blocks: int = 0
    """How many blocks a card holds; `home` is for those beyond them."""

    @property
    def elsewhere_bytes(self) -> int:
        """Of planes, what is not on the device."""
        return 0 if self.home == "device" else max(0, self.planes_bytes - self.kept_blocks * self.block_bytes)

    def text(self) -> str:
        """For people: where and how much."""
        place = {"device": "on the device", "ram": "in RAM", "disk": "in a file"}[self.home]
        rest = self.planes_bytes if self.home == "device" else self.elsewhere_bytes
        return f"{self.dtype}, peak {self.device_bytes / 1e9:.2f} GB, with {rest / 1e9:.2f} GB of planes {place}"


def strip_rows(one: Pass, strip_bytes: int) -> int:
    """Rows of the target (of the source for `up`) in a strip, all strips of a pass being about equally high."""
    across = max(one.inputs * one.width, one.outputs * one.out_width)
    across *= {"up": 2, "down": 2}.get(one.kind, 1)
    height = one.height if one.kind == "up" else one.out_height
    most = max(1, min(height, strip_bytes // (4 * across)))
    return ceil(height / ceil(height / most))


def attention_tokens(one: Pass, item_bytes: int, strip_bytes: int) -> tuple[int, int]:
    """How many queries and how many keys meet in one product: their scores, in fp32, are as large as a strip.

    Keys come in the blocks of their plane; of 16 bits as many as make a strip when they are widened to fp32.
    """
    tokens, scores = one.height * one.width, max(4096, strip_bytes // 4)
    keys = block_rows(one.width * one.inputs * item_bytes) * one.width
    if item_bytes < 4:
        keys = min(keys, max(64, strip_bytes // (4 * one.inputs)))
    keys = min(tokens, keys, scores // 64)
    return min(tokens, max(64, min(2048, scores // keys))), keys


def block_rows(row_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Rows in a block of a plane: as many as fit."""
    return max(1, block_bytes // row_bytes)


def planes_held(passes: Iterable[Pass], item_bytes: int) -> list[int]:
    """Bytes of all planes at the worst moment of each pass, with the rows given back on the way."""

    def plane(height: int, width: int, channels: int) -> int:
        return height * width * channels * item_bytes

    return _held(passes, plane, lambda one: BLOCK_BYTES)


def _held(
    passes: Iterable[Pass], size_of: Callable[[int, int, int], int], ahead_of: Callable[[Pass], int]
) -> list[int]:
    """What planes hold at the worst moment of each pass; one that grows is `ahead_of` it what another gives back."""
    alive: dict[str, int] = {}
    held = []
    for one in passes:
        read = size_of(one.height, one.width, one.inputs)
        made = size_of(one.out_height, one.out_width, one.outputs)
        rest = sum(size for name, size in alive.items() if name not in (one.source, one.target))
        grown = made * (2 if one.shortcut else 1)
        if one.kind == "attention":
            held.append(rest + 3 * made)
        elif one.adds or not one.last_use:
            held.append(rest + read + grown)
        else:
            held.append(rest + max(read, grown) + min(read, grown, ahead_of(one)))
        if one.last_use:
            alive.pop(one.source, None)
        alive[one.target] = made
        if one.shortcut:
            alive["x"] = made
    return held


def planes_peak(passes: Iterable[Pass], item_bytes: int) -> int:
    """Bytes of all planes at the worst moment."""
    return max(planes_held(passes, item_bytes))


def block_size(passes: Iterable[Pass], item_bytes: int) -> int:
    """Bytes of a block of any plane: of as many of the widest rows as come near `BLOCK_BYTES`, but of one at least.

    Rows of other planes are mostly a half or a quarter of the widest, so that little of a block is left over.
    """
    widest = max(max(one.width * one.inputs, one.out_width * one.outputs) for one in passes) * item_bytes
    return ceil(widest * max(1, BLOCK_BYTES // widest) / PAGE_BYTES) * PAGE_BYTES


def blocks_held(passes: Iterable[Pass], item_bytes: int, strip_bytes: int, block_bytes: int) -> int:
    """Blocks of all planes at the worst moment: a strip is written before what it was made of is given back."""

    def blocks(height: int, width: int, channels: int) -> int:
        return ceil(height / block_rows(width * channels * item_bytes, block_bytes))

    def ahead(one: Pass) -> int:
        rows = strip_rows(one, strip_bytes) * (2 if one.kind == "up" else 1)
        written = blocks(rows, one.out_width, one.outputs) + 1
        return written * (2 if one.shortcut else 1) + HALO_BLOCKS

    return max(_held(passes, blocks, ahead))


def device_peak(passes: tuple[Pass, ...], strip_bytes: int, item_bytes: int, home: str, *, on_cpu: bool) -> int:
    """Bytes on the device: the work of a strip, the picture, and on a CPU planes if they live there.

    On a CPU what a pass has freed goes back to the system before the next one, so that each counts by itself. A card's
    allocator keeps it: the largest work counts, beside all blocks of planes that are on the card.
    """
    work = [_work(one, strip_bytes, item_bytes) for one in passes]
    picture = passes[-1].out_height * passes[-1].out_width * passes[-1].outputs  # in bytes of 8 bits
    if on_cpu:
        held = planes_held(passes, item_bytes) if home == "device" else [0] * len(passes)
        return max(a + b for a, b in zip(held, work, strict=True)) + picture + CPU_KEPT_BYTES
    workspace = int(CARD_FP32_WORKSPACE * strip_bytes) if item_bytes == 4 else 0
    return max(work) + picture + max(CARD_KEPT_BYTES, workspace)


def _work(one: Pass, strip_bytes: int, item_bytes: int) -> int:
    if one.kind == "attention":
        queries, keys = attention_tokens(one, item_bytes, strip_bytes)
        queries = min(one.height * one.width, max(queries, one.width))  # whole rows
        widened = 2 * keys * one.inputs if item_bytes == 2 else 0
        return 4 * (2 * queries * keys + 4 * queries * one.inputs + 4 * one.inputs**2 + widened)
    rows = strip_rows(one, strip_bytes)
    window_rows = {"up": rows + 2, "down": 2 * rows + 1}.get(one.kind, rows + 2)
    out_rows = 2 * rows if one.kind == "up" else rows
    window = window_rows * one.width * one.inputs
    out = out_rows * one.out_width * one.outputs
    stored = one.inputs * one.outputs * 9 * item_bytes
    kernel = stored * 16 // 9 if one.kind == "up" else stored
    widened = 4 * window if item_bytes == 2 and one.norm else 0
    results = out * item_bytes * (2 if one.kind == "up" or one.shortcut else 1)
    strip = max(widened, results + 4 * out)
    return window * item_bytes + max(stored + kernel, kernel * 3 // 2 + strip)


def plan_vae(
    passes: tuple[Pass, ...], dtype: str, budget_bytes: int, device: DeviceInfo, *, smaller: int = 0
) -> VaePlan:
    """The plan for passes in `dtype` within `budget_bytes` of the device.

    Planes stay on the device where they fit. Of a card's as much as fits does, and the rest goes to RAM, else to a
    file; on a CPU, where device and RAM are one, all of it to a file. `smaller` asks for the n-th next smaller plan,
    after one ran out of memory; the same one again where there is no smaller. Raises DoesNotFit where not even the
    smallest strips fit.
    """
    if smaller:
        larger = plan_vae(passes, dtype, budget_bytes, device, smaller=smaller - 1)
        try:
            return plan_vae(passes, dtype, larger.device_bytes * 3 // 4, device)
        except DoesNotFit:
            return larger
    choices = [("device", MIN_STRIP_BYTES), ("disk", MIN_STRIP_BYTES)]
    if device.kind != "cpu":
        choices = [("device", LOW_STRIP_BYTES), ("ram", MIN_STRIP_BYTES), *choices]
    for home, lowest_bytes in choices:
        plan = _plan(passes, dtype, budget_bytes, device, home, lowest_bytes)
        if plan.device_bytes <= budget_bytes and (home != "ram" or _fits_ram(plan, device)):
            return plan
    width, height = picture_size(passes)
    need, size = f"give --vram {-(-plan.device_bytes // 1_000_000)}M or more", f"{width}x{height}"
    raise DoesNotFit(
        f"the VAE needs {plan.device_bytes / 1e6:,.1f} MB for {size} in {dtype} even in the smallest strips, "
        f"and {budget_bytes / 1e6:,.1f} MB may be used",
        need if device.kind == "cpu" else f"{need}, or use --device cpu",
    )


def picture_size(passes: Sequence[Pass]) -> tuple[int, int]:
    """Width and height of the picture, which is the first plane or the last."""
    return max((passes[0].width, passes[0].height), (passes[-1].out_width, passes[-1].out_height))


def _plan(
    passes: tuple[Pass, ...], dtype: str, budget_bytes: int, device: DeviceInfo, home: str, lowest_bytes: int
) -> VaePlan:
    """With the highest strips that fit, down to `lowest_bytes`, and as many blocks on a card as fit beside them."""
    most_bytes = CPU_STRIP_BYTES if device.kind == "cpu" else CARD_STRIP_BYTES[home]
    strip_bytes = most_bytes if device.kind == "cpu" else max(MIN_STRIP_BYTES, min(most_bytes, budget_bytes // 16))
    while (plan := _with_strips(passes, dtype, device, home, strip_bytes)).device_bytes > budget_bytes:
        if strip_bytes <= lowest_bytes:
            return plan
        strip_bytes = max(lowest_bytes, strip_bytes // 2)
    if home == "device" or device.kind == "cpu":
        return plan
    kept = min(plan.planes_bytes, int(KEPT_SHARE * (budget_bytes - plan.device_bytes))) // plan.block_bytes
    return replace(plan, kept_blocks=kept, device_bytes=plan.device_bytes + kept * plan.block_bytes)


def _with_strips(passes: tuple[Pass, ...], dtype: str, device: DeviceInfo, home: str, strip_bytes: int) -> VaePlan:
    """With strips of this height, and of planes nothing on the device, or all."""
    item = DTYPE_BYTES[dtype]
    if device.kind == "cpu":
        peak = device_peak(passes, strip_bytes, item, home, on_cpu=True)
        return VaePlan(dtype, home, strip_bytes, peak, planes_peak(passes, item))
    block_bytes = block_size(passes, item)
    blocks = blocks_held(passes, item, strip_bytes, block_bytes)
    kept = blocks if home == "device" else 0
    work = device_peak(passes, strip_bytes, item, home, on_cpu=False)
    if not device.growing_segments:
        work = int(work * FRAGMENTED_WORK)
    return VaePlan(dtype, home, strip_bytes, work + kept * block_bytes, blocks * block_bytes, block_bytes, kept)


def _fits_ram(plan: VaePlan, device: DeviceInfo) -> bool:
    if device.ram_bytes is None:
        return True
    beside = plan.device_bytes if device.unified else min(plan.device_bytes, RAM_MARGIN_BYTES)
    return plan.elsewhere_bytes + beside <= device.ram_bytes
