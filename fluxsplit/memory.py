"""How much memory a device has and how much of it a stage may take: what is typed (`8G`, `75%`, `auto`), in bytes.

On a graphics card the budget is of what torch's allocator takes; the driver has taken its part before `auto` looks at
what is free. On a CPU it is of anonymous memory, which cannot be given back to others; the page cache that holds
mapped weights is not counted, because the system takes it back whenever it likes.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import psutil

from fluxsplit.errors import UsageError

KINDS = ("cpu", "cuda", "hip")
DESKTOP_BYTES = 400_000_000
"""Left to the desktop by `auto`: what a browser and a compositor come to want while a picture is made."""
DESKTOP_SHARE = 0.04
"""The same as a share of all there is; the larger counts."""
CPU_AUTO_SHARE = 0.75
"""Of the RAM that is free now, by `auto` on a CPU."""
PINNED_SHARE = 0.25
"""Of the RAM that is free now, at most, for what a card fetches by itself: it cannot be given to others meanwhile."""
LEAST_BYTES = 1_000_000
"""Who asks for less has forgotten the unit."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMG]I?|)B?", re.ASCII | re.IGNORECASE)
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)\s*%", re.ASCII)
_HINT = "write it as 8G, 800M, 75% or auto"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What a plan has to know of the device that computes. Rates are None where nobody knows them."""

    kind: str
    """`cpu`, `cuda` (NVIDIA) or `hip` (AMD)."""
    name: str
    free_bytes: int
    """Free at this moment: of the card's memory, or of RAM on a CPU."""
    total_bytes: int
    unified: bool = False
    """Whether the device's memory is the machine's RAM: a CPU, or an APU."""
    flops_per_s: float | None = None
    """Of matrix products in the compute dtype, with every thread that computes."""
    attention_flops_per_s: float | None = None
    """Of attention's two products, where they run at another rate."""
    expand_elements_per_s: float | None = None
    """float8 codes expanded to the compute dtype; None where products expand as they go."""
    elementwise_per_s: float | None = None
    """Values through a fixed mixture of casts and arithmetic; stands for all that is no matrix product and not GELU."""
    gelu_per_s: float | None = None
    """Values through GELU."""
    bus_bytes_per_s: float | None = None
    """From the machine's RAM to the device; None for a CPU, which has none to cross."""
    feed_bytes_per_s: float | None = None
    """Copied out of the page cache by those who feed the bus, where that is measured."""
    disk_bytes_per_s: float | None = None
    """From the disk that holds the weights, where it was measured: only if they do not stay in RAM."""
    ram_bytes: int | None = None
    """RAM that is free for the page cache; None where nobody knows."""
    cores: int = 1
    processor_cores: int = 1
    """Of the machine's processor, as many as torch uses."""
    fused_attention: bool = True
    """False where attention would materialise the score matrix (RDNA2): it is then computed in chunks of queries."""
    tile_products: bool = False
    """Whether a CPU multiplies 16 bits by tiles (AMX), for which x or the matrix is arranged anew."""
    growing_segments: bool = True
    """False where torch's allocator cannot use what was freed in one size for another (Windows, AMD)."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"device kind {self.kind!r} is not one of {', '.join(KINDS)}")


def check_budget(text: str) -> str:
    """`text` if it is an amount, a share or `auto`, whatever the device; raises UsageError."""
    if text.strip().lower() != "auto" and _amount(text) is None and _share(text) is None:
        raise UsageError(f"--vram {text!r} is not an amount of memory", _HINT)
    return text.strip()


def budget_bytes(text: str, device: DeviceInfo, *, again: bool = False) -> int:
    """Bytes that `8G`, `75%` (of what is free) or `auto` stand for on a device.

    `auto` takes what is free but for a desktop's share. Raises UsageError for what is no amount, is nothing, or is
    more than the device has free. G is 10^9; GiB is 2^30. With `again`, as other programs may have taken of what was
    free at first, an amount is a bound of what `auto` gives now.
    """
    check_budget(text)
    share, amount = _share(text), _amount(text)
    if share is not None:
        return int(device.free_bytes * share)
    if amount is None:
        return auto_bytes(device)
    if again:
        return min(amount, auto_bytes(device))
    if amount > device.free_bytes:
        free, total = _gb(device.free_bytes), _gb(device.total_bytes)
        raise UsageError(
            f"--vram {text.strip()} is more than {device.name} has: {free} of {total} are free",
            "close other programs, or give --vram auto",
        )
    return amount


def auto_bytes(device: DeviceInfo) -> int:
    """What may be taken of a device without being told."""
    if device.kind == "cpu":
        return int(device.free_bytes * CPU_AUTO_SHARE)
    desktop = max(DESKTOP_BYTES, int(device.total_bytes * DESKTOP_SHARE))
    return max(0, device.free_bytes - desktop)


def free_ram_bytes() -> int:
    """RAM that a process can still get without swapping; a container's limit counts."""
    free = int(psutil.virtual_memory().available)
    limit, used = _container("memory.max"), _container("memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used + (_container_file_bytes() or 0)))
    return free


def total_ram_bytes() -> int:
    """RAM of the machine, or of the container that limits it."""
    limit = _container("memory.max")
    total = int(psutil.virtual_memory().total)
    return total if limit is None else min(total, limit)


def _amount(text: str) -> int | None:
    match = _AMOUNT.fullmatch(text.strip())
    if not match:
        return None
    amount = int(float(match[1]) * _UNITS[match[2].upper()])
    if amount <= 0:
        raise UsageError(f"--vram {text!r} is nothing", _HINT)
    if amount < LEAST_BYTES:
        raise UsageError(f"--vram {text!r} is {amount} bytes", f"write it as {match[1]}G, or {match[1]}M")
    return amount


def _share(text: str) -> float | None:
    match = _SHARE.fullmatch(text.strip())
    if not match:
        return None
    percent = float(match[1])
    if not 0 < percent <= 100:
        raise UsageError(f"--vram {text!r} is outside 0%..100%", _HINT)
    return percent / 100


def _container(name: str) -> int | None:
    """A figure of this process's cgroup (version 2), None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        return int((Path("/sys/fs/cgroup") / name).read_text())
    return None


def _container_file_bytes() -> int | None:
    """Page cache that is charged to the cgroup and can be taken back."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (Path("/sys/fs/cgroup") / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return None


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
