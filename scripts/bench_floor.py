"""What one step cannot be faster than: its matrix products alone, and moving the weights, measured on this machine.

Run as a process of its own by `bench.py`, with the same device, dtype and number of threads as the stage; prints one
JSON line. The shapes come from the weight file, not from a table of Flux's.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from bench_fp8 import best_s, once_s
from bench_watch import drop_from_cache, read_s
from fluxsplit import checkpoint
from fluxsplit.attention import attend_in_chunks, has_fused_attention
from fluxsplit.checkpoint import Part
from fluxsplit.device import DTYPE_NAMES, device_info, pick_device, pick_dtype
from fluxsplit.memory_plan import readers_of
from fluxsplit.model_sizes import MODULATION
from fluxsplit.rates import QUERY_CHUNK, feed_bytes_per_s

TIMES = 21
"""Of which the one in the middle counts, as with the steps: on a machine that others share, what takes long is slowed
down by them always, and what is short now and then not. The best one counts against the best of each block."""
NEEDED_ONCE = tuple(f".{name}.weight" for name in MODULATION)
"""No part of a step."""
TRANSFER_BYTES = 1 << 28


def products(part: Part, image_tokens: int, text_tokens: int) -> Counter[tuple[int, int, int]]:
    """How often a step multiplies [rows, inputs] by [outputs, inputs], by (rows, outputs, inputs)."""
    counts: Counter[tuple[int, int, int]] = Counter()
    for name, source in part.sources.items():
        if len(source.shape) == 2 and not name.endswith(NEEDED_ONCE):
            counts[(_rows(name, image_tokens, text_tokens), *source.shape)] += 1
    return counts


def _rows(name: str, image_tokens: int, text_tokens: int) -> int:
    """Rows that a matrix is multiplied with, by its place (diffusers' names)."""
    if name.startswith(("time_text_embed", "norm_out")):
        return 1  # modulation, from the embedded timestep
    if name.startswith("single_transformer_blocks"):
        return image_tokens + text_tokens
    of_text = any(word in name for word in (".ff_context.", ".add_", ".to_add_out", "context_embedder"))
    return text_tokens if of_text else image_tokens


def work(
    part: Part, image_tokens: int, text_tokens: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[int, Callable[[], object]]]:
    """The matrix products of a step, attention's among them: how often it makes each, and what makes it once."""
    found: list[tuple[int, Callable[[], object]]] = [
        (count, _linear(_random((rows, inputs), dtype, device), _random((outputs, inputs), dtype, device)))
        for (rows, outputs, inputs), count in products(part, image_tokens, text_tokens).items()
    ]
    blocks = part.count("transformer_blocks.%d.") + part.count("single_transformer_blocks.%d.")
    found.append((blocks, _attention(part, image_tokens + text_tokens, dtype, device)))
    for _, product in found:  # the first time is another matter
        product()
    return found


def compute_s(found: list[tuple[int, Callable[[], object]]], device: torch.device) -> dict[str, float]:
    """Seconds of all that `work` found, CPU seconds on a CPU: by each one's median, and by its best; and by the clock.

    They take turns: where others slow a processor down for seconds at a time, each meets that as often as the next.
    """
    rounds = [[once_s(product, device) for _, product in found] for _ in range(TIMES)]
    sums = dict.fromkeys(("compute_s", "quiet_compute_s", "compute_wall_s"), 0.0)
    for (count, _), taken in zip(found, zip(*rounds, strict=True), strict=True):
        wall_s, counted_s = zip(*taken, strict=True)
        sums["compute_s"] += count * median(counted_s)
        sums["quiet_compute_s"] += count * min(counted_s)
        sums["compute_wall_s"] += count * median(wall_s)
    return {name: round(seconds, 4) for name, seconds in sums.items()}


def _attention(part: Part, tokens: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    head = part.shape("transformer_blocks.0.attn.norm_q.weight")[0]
    heads = part.shape("x_embedder.weight")[0] // head
    query, key, value = (_random((1, heads, tokens, head), dtype, device) for _ in range(3))

    @torch.inference_mode()
    def attend() -> torch.Tensor:
        if has_fused_attention(device, dtype, head):
            return F.scaled_dot_product_attention(query, key, value)
        return attend_in_chunks(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), QUERY_CHUNK)

    return attend


def _linear(x: torch.Tensor, matrix: torch.Tensor) -> Callable[[], object]:
    @torch.inference_mode()
    def product() -> torch.Tensor:
        return F.linear(x, matrix)

    return product


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float32).mul_(0.05).to(dtype).to(device)


def bus_bytes_per_s(device: torch.device) -> float:
    """From pinned memory to the card."""
    pinned = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(TRANSFER_BYTES, dtype=torch.uint8, device=device)
    return TRANSFER_BYTES / best_s(lambda: there.copy_(pinned, non_blocking=True), device)


def measure(
    path: Path, size: tuple[int, int], text_tokens: int, dtype_name: str, device_text: str, transfers: bool
) -> dict[str, object]:
    """The floor of one step over the file, without weights of its own in memory; on request without `transfers`."""
    device = pick_device(device_text)
    part = checkpoint.part(path, "transformer")
    parameters = checkpoint.describe(path).parts["transformer"].parameters
    dtype = pick_dtype(dtype_name, device, parameters)
    image_tokens = (size[0] // 16) * (size[1] // 16)
    found: dict[str, object] = {
        "dtype": DTYPE_NAMES[dtype],
        "image_tokens": image_tokens,
        "text_tokens": text_tokens,
        "weight_bytes": checkpoint.describe(path).parts["transformer"].bytes,
        **compute_s(work(part, image_tokens, text_tokens, dtype, device), device),
    }
    if not transfers:
        return found
    return found | (disk_rates(path) if device.type == "cpu" else card_rates(path, device))


def disk_rates(path: Path) -> dict[str, object]:
    """Bytes a second of one thread, from the disk and then from the page cache."""
    drop_from_cache(path)
    file_bytes = path.stat().st_size
    return {
        "disk_bytes_per_s": round(file_bytes / read_s(path)),
        "page_cache_bytes_per_s": round(file_bytes / read_s(path)),
    }


def card_rates(path: Path, device: torch.device) -> dict[str, object]:
    """Bytes a second from pinned memory to the card, and out of the page cache by the threads that read."""
    read_s(path)
    fed = feed_bytes_per_s(str(path), readers_of(device_info(device)))
    return {"bus_bytes_per_s": round(bus_bytes_per_s(device)), "page_cache_bytes_per_s": fed and round(fed)}


def main() -> None:
    """Measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--text-tokens", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--products", action="store_true", help="only these, nothing that is read or moved")
    args = parser.parse_args()
    size = (args.width, args.height)
    print(json.dumps(measure(args.path, size, args.text_tokens, args.dtype, args.device, not args.products)))


if __name__ == "__main__":
    main()
