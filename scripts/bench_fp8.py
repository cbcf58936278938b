"""float8 expansion: all 256 codes compared, and billions of elements a second on one core, against torch's own cast.

Run by `bench.py`, with the device as its argument; prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from fluxsplit import fp8
from fluxsplit.device import DTYPE_NAMES, device_name, pick_device
from fluxsplit.held_memory import CPU_PIECE_BYTES

SHAPE = (12288, 3072)
"""The widest matrix of Flux.1's blocks, which a CPU expands piece by piece into one buffer, as in a step."""
TIMES = 7


def measure(device: torch.device) -> dict[str, object]:
    """For each pair of formats how many codes are right and how fast; on a CPU with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            f"{str(float8).removeprefix('torch.float8_')} to {name}": _pair(float8, dtype, device)
            for float8 in fp8.FLOAT8
            for dtype, name in DTYPE_NAMES.items()
        }
    finally:
        torch.set_num_threads(threads)


def _pair(float8: torch.dtype, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    right, finite, refused = compare_codes(float8, dtype, device)
    codes = torch.randint(0, 0x70, SHAPE, dtype=torch.int32).to(torch.uint8).view(float8).to(device).flatten()
    pieces = codes.split(CPU_PIECE_BYTES // dtype.itemsize if device.type == "cpu" else codes.numel())
    out = torch.empty(pieces[0].shape, dtype=dtype, device=device)

    def rate(expand: Callable[[torch.Tensor, torch.Tensor], object], times: int = TIMES) -> float:
        def all_pieces() -> None:
            for piece in pieces:
                expand(piece, out[: piece.numel()])

        return round(codes.numel() / best_s(all_pieces, device, times) / 1e9, 2)

    return {
        "codes_equal": f"{right} of {finite}",
        "codes_refused": refused,
        "gelements_per_s": rate(fp8.expand_into),
        "torch_gelements_per_s": rate(lambda piece, out: out.copy_(piece), 2),
    }


def compare_codes(float8: torch.dtype, dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """Of all 256 codes: finite ones that have torch's bits, finite ones, and others that the check refuses."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(float8)
    exact = codes.float()
    finite = exact.isfinite()
    got = fp8.expand(codes.to(device), dtype).cpu()
    same = (got == exact.to(dtype)) & (got.signbit() == exact.signbit()) & finite
    others = [code for code, ok in zip(codes.view(torch.uint8).split(1), finite.tolist(), strict=True) if not ok]
    refused = sum(fp8.has_nonfinite(code.view(float8).to(device)) for code in others)
    return int(same.sum()), int(finite.sum()), refused


def best_s(work: Callable[[], object], device: torch.device, times: int = TIMES) -> float:
    """Seconds that `work` takes at best: CPU seconds of this process on a CPU, else wall seconds to the last kernel."""
    work()
    return min(once_s(work, device)[1] for _ in range(times))


def once_s(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds that `work` takes this time by the clock, and as `best_s` counts them."""
    counted = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    began_s, started_s = time.perf_counter(), counted()
    work()
    _wait(device)
    return time.perf_counter() - began_s, counted() - started_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    on = pick_device(sys.argv[1])
    print(json.dumps({"device": device_name(on), "fp8": measure(on)}))
