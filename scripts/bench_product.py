"""The product by tiles against torch's: the CPU time of Flux.1's matrices, on one thread or several.

    python scripts/bench_product.py [--threads 2] [--tokens 320]

Each matrix of float8 codes is multiplied with in three ways, in turns: by `tile_product`; by torch with codes expanded
piece by piece, as a step does it elsewhere; by torch with a matrix in bf16, expanded before. Six matrices take turns,
as in a step none is in a core's own cache when its turn comes; the one in bf16 is the same every time. Milliseconds
are the best and the median, of all threads. Needs a processor with AMX, and llvmlite.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

from fluxsplit import tile_product
from fluxsplit.held_memory import CPU_PIECE_BYTES
from fluxsplit.stored_layers import Scratch, StoredLinear

SHAPES = ((3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360))
MATRICES = 6


def main() -> None:
    """Print one line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--times", type=int, default=36)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for rows, inputs in SHAPES:
        for way, taken_s in measure(args.tokens, rows, inputs, args.times).items():
            operations = 2 * args.tokens * rows * inputs
            best_s, median_s = min(taken_s), median(taken_s)
            print(
                f"{rows}x{inputs}, {args.tokens} tokens, {way}: {best_s * 1e3:.2f} ms, median {median_s * 1e3:.2f},"
                f" {operations / best_s / 1e9:.0f} billion operations a second"
            )


@torch.inference_mode()
def measure(tokens: int, rows: int, inputs: int, times: int) -> dict[str, list[float]]:
    """CPU seconds of every run of each way."""
    x, bias = torch.randn(tokens, inputs).bfloat16(), torch.randn(rows).bfloat16()
    matrices = [torch.randn(rows, inputs).mul_(0.05).to(torch.float8_e4m3fn) for _ in range(MATRICES)]
    dense, out = matrices[0].to(torch.bfloat16), torch.empty(tokens, rows, dtype=torch.bfloat16)
    scratch = Scratch()
    if not tile_product.multiplies(matrices[0], x):
        raise SystemExit("this processor has no tiles, or llvmlite is not installed")
    pieces = Scratch(CPU_PIECE_BYTES)

    def by_pieces(codes: torch.Tensor) -> None:
        StoredLinear("a matrix", codes, None, bias, scratch=pieces)._by_pieces([x], [out])

    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "by tiles": lambda codes: tile_product.multiply_into(x, codes, 1.0, bias, out, scratch.bytes),
        "expanded by pieces": by_pieces,
        "torch, in bf16": lambda codes: F.linear(x, dense, bias),
    }
    taken_s: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(times):
        for way, run in ways.items():
            started_s = time.process_time()
            run(matrices[number % MATRICES])
            taken_s[way].append(time.process_time() - started_s)
    return taken_s


if __name__ == "__main__":
    main()
