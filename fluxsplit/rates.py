"""How fast this device multiplies, attends, expands, copies and reads, measured in a moment on the shapes that come.

A table of graphics cards would be wrong for the next one, and for every laptop that runs hot. Less than a second
at the start of steps that take several each is what a prediction costs instead.

On a shared machine somebody else's work beside ours, as on the other thread of a core, halves a rate for some tenths
of a second, now and then for seconds. So nothing is measured at one go: rates take turns, and each one's quickest turn
counts.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F

from fluxsplit import fp8, tile_product
from fluxsplit.attention import attend, attend_in_chunks
from fluxsplit.background_reads import Read, reads_by
from fluxsplit.gelu import gelu_
from fluxsplit.held_memory import CPU_PIECE_BYTES
from fluxsplit.memory import DeviceInfo
from fluxsplit.memory_plan import CACHE_MARGIN, PIECE_BYTES, readers_of
from fluxsplit.stored_layers import ROWS, Scratch
from fluxsplit.weights import WeightFile

SAMPLES, SAMPLE_S = 5, 0.03
"""Turns of each rate, and their length."""
MAX_TOKENS, MAX_CARD_TOKENS = 512, 4096
"""A card is not busy with few."""
BUS_BYTES = 32 << 20
FEED_BYTES, FEED_SAMPLES = 256 << 20, 4
"""At most so much is copied, so often, to learn how fast that is."""
QUERY_CHUNK = 512
FINITE_CODES = 0x70
"""Codes of e4m3fn from 0 up to 120, whose products do not leave fp16."""
DISK_BYTES, DISK_S = 64 << 20, 0.3
"""At most so much is read, and for no longer, to learn how fast a disk is."""
READ_BYTES = 4 << 20


@torch.inference_mode()
def with_rates(
    info: DeviceInfo,
    device: torch.device,
    dtype: torch.dtype,
    hidden: int,
    head: int,
    tokens: int,
    *,
    float8: bool = True,
) -> DeviceInfo:
    """`info` with the rates of products of `hidden` channels, of attention, expansion, GELU, sums and the bus.

    `float8` says whether matrices are stored so, which some products expand as they go.
    """
    found = _with_rates(info, device, dtype, hidden, head, tokens, float8)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of a small card's memory nothing may be kept for this
    return found


def _with_rates(
    info: DeviceInfo, device: torch.device, dtype: torch.dtype, hidden: int, head: int, tokens: int, float8: bool
) -> DeviceInfo:
    rows = max(64, min(tokens, MAX_TOKENS if device.type == "cpu" else MAX_CARD_TOKENS))
    outputs = 3 * hidden
    if device.type == "cpu":  # as a matrix comes there, and no more memory than the step will take
        outputs = max(1, min(outputs, CPU_PIECE_BYTES // (hidden * dtype.itemsize) // ROWS * ROWS))
    x, matrix, bias = (_values(shape, dtype, device) for shape in ((rows, hidden), (outputs, hidden), (outputs,)))
    head = min(head, hidden)
    heads = x[:, : hidden // head * head].view(1, rows, hidden // head, head)
    wide, activated = _values((rows, hidden), torch.float32, device), torch.empty_like(x)
    # not all devices cast to float8; the matrix is expanded from these in turn, so that it is of random values as well
    codes = torch.randint(0, FINITE_CODES, matrix.shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    copy = {} if device.type == "cpu" else {"bus": _bus_copy(device)}

    def gelu() -> torch.Tensor:
        if device.type == "cpu":  # of the same values each time, as it would approach 0 and be slow there
            return gelu_(activated.copy_(x))
        return F.gelu(x, approximate="tanh")

    by_tiles = float8 and tile_product.multiplies(codes, x)
    expansion = {} if by_tiles else {"expansion": lambda: fp8.expand_into(codes, matrix)}
    run_s = _seconds(
        device,
        products=_products_by_tiles(x, codes, bias) if by_tiles else lambda: F.linear(x, matrix, bias),
        attention=lambda: _attend(heads, info.fused_attention),
        sums=lambda: (x.float() * wide + wide).to(dtype) * x + x,
        gelu=gelu,
        **expansion,
        **copy,
    )
    return replace(
        info,
        flops_per_s=2 * rows * hidden * outputs / run_s["products"],
        attention_flops_per_s=4 * rows**2 * hidden / run_s["attention"],
        expand_elements_per_s=outputs * hidden / run_s["expansion"] if expansion else None,
        elementwise_per_s=rows * hidden / run_s["sums"],
        gelu_per_s=rows * hidden / run_s["gelu"],
        bus_bytes_per_s=BUS_BYTES / run_s["bus"] if copy else None,
    )


def feed_bytes_per_s(path: str, readers: int) -> float | None:
    """Bytes a second that so many threads of the reader's copy out of the page cache, from the middle of a file.

    None for a file that is too small to tell.
    """
    pieces = min(FEED_BYTES, Path(path).stat().st_size) // PIECE_BYTES
    if not pieces:
        return None
    file, reads = WeightFile(path), reads_by(readers)
    start = (Path(path).stat().st_size - pieces * PIECE_BYTES) // 2
    buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8) for _ in range(readers)]
    best_s = math.inf
    with contextlib.closing(reads):
        for _ in range(FEED_SAMPLES):  # the first may read from the disk
            started_s, begun = time.perf_counter(), deque[Read]()
            for number in range(pieces):
                if number >= readers:
                    begun.popleft().wait()
                begun.append(reads.begin(file, start + number * PIECE_BYTES, buffers[number % readers]))
            while begun:
                begun.popleft().wait()
            best_s = min(best_s, time.perf_counter() - started_s)
    return pieces * PIECE_BYTES / max(best_s, 1e-9)


def with_file_rates(info: DeviceInfo, path: str, weight_bytes: int) -> DeviceInfo:
    """`info` with how fast the weights in `path` come.

    The disk counts where the weights do not all stay in RAM.
    """
    if info.bus_bytes_per_s is not None:
        info = replace(info, feed_bytes_per_s=feed_bytes_per_s(path, readers_of(info)))
    if info.ram_bytes is None or weight_bytes <= info.ram_bytes * CACHE_MARGIN or not hasattr(os, "posix_fadvise"):
        return info
    return replace(info, disk_bytes_per_s=_disk(path))


def _disk(path: str) -> float | None:
    """Reads from the middle of the file, after its pages there have been given back; None for an empty file."""
    buffer = bytearray(READ_BYTES)
    with Path(path).open("rb", buffering=0) as file:
        start = os.fstat(file.fileno()).st_size // 2
        os.posix_fadvise(file.fileno(), start, DISK_BYTES, os.POSIX_FADV_DONTNEED)
        file.seek(start)
        done, started_s = 0, time.perf_counter()
        while done < DISK_BYTES and time.perf_counter() - started_s < DISK_S:
            count = file.readinto(buffer)
            if not count:
                break
            done += count
        return done / (time.perf_counter() - started_s) if done else None


def _values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Random ones: a card that multiplies zeros draws less power, and is quicker."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).mul_(0.05).to(dtype)


def _products_by_tiles(x: torch.Tensor, codes: torch.Tensor, bias: torch.Tensor) -> Callable[[], object]:
    """Several matrices take turns, as in a step none is in a core's own cache when its turn comes."""
    matrices, out, scratch = (
        cycle([codes, *(codes.clone() for _ in range(7))]),
        x.new_empty(len(x), len(codes)),
        Scratch(),
    )
    return lambda: tile_product.multiply_into(x, next(matrices), 1.0, bias, out, scratch.bytes)


def _attend(heads: torch.Tensor, fused: bool) -> torch.Tensor:
    """Attention as it will be computed; heads [1, L, H, D]."""
    if not fused:
        return attend_in_chunks(heads, heads, heads, QUERY_CHUNK)
    return attend(heads, heads, heads)


def _bus_copy(device: torch.device) -> Callable[[], object]:
    """Copies `BUS_BYTES` to the card, out of pinned memory where that is to be had."""
    try:
        here = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        here = torch.empty(BUS_BYTES, dtype=torch.uint8)
    there = torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
    return lambda: there.copy_(here, non_blocking=True)


def _seconds(device: torch.device, **runs: Callable[[], object]) -> dict[str, float]:
    """Seconds that one run of each takes, by the quickest of several samples of a few runs, the first run not counted.

    On a CPU its seconds divided by the threads, so that a busy machine does not look like a slow one.
    """
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, math.inf)
    for name in [*runs] * SAMPLES:
        best[name] = min(best[name], _sample_s(runs[name], device))
    return {name: max(sample_s, 1e-9) for name, sample_s in best.items()}


def _sample_s(run: Callable[[], object], device: torch.device) -> float:
    """What other threads have used is added up some hundred times a second only: a sample is longer than that."""
    clock, share = (time.process_time, torch.get_num_threads()) if device.type == "cpu" else (time.perf_counter, 1)
    _wait(device)
    started_s, began_s, runs = clock(), time.perf_counter(), 0
    while not runs or time.perf_counter() - began_s < SAMPLE_S:
        run()
        runs += 1
        _wait(device)
    return (clock() - started_s) / share / runs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
