"""Holds the memory plan's predictions against what the sample stage then used, at ten points of size and budget.

    python scripts/synthetic_checkpoint.py /tmp/short.safetensors --depth 2+4
    python scripts/bench_plan.py /tmp/short.safetensors

Each point is a run of the real stage in its own process with one thread: its `plan` event against the peak of RssAnon,
imports included, and against CPU seconds of a warm step (wall seconds of a shared machine say nothing). Where others
use the machine, a run may meet them while its rates are measured, or while it computes, each for seconds: `--repeat`
goes through all points several times. What it says of each then is the median of peaks, and the quickest prediction
over a step made of what each block took at its best in any run, as those met nobody. The last line is JSON of all
runs. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench import Watched, watch_stage

POINTS = (
    # width, height, text tokens, dtype, budget in GB
    (256, 256, 64, "bf16", 0.7),
    (512, 512, 256, "bf16", 0.8),
    (512, 512, 256, "bf16", 4),
    (768, 512, 256, "bf16", 1),
    (768, 768, 512, "bf16", 1.5),
    (1024, 768, 256, "bf16", 1.5),
    (1024, 1024, 256, "bf16", 2),
    (256, 256, 64, "fp32", 1),
    (512, 512, 256, "fp32", 1.5),
    (640, 768, 256, "fp32", 2),
)


def measure(path: Path, point: tuple[int, int, int, str, float], steps: int) -> dict[str, Any]:
    """One run; predicted and measured side by side."""
    width, height, text_tokens, dtype, cap = point
    args = argparse.Namespace(
        path=path, size=(width, height), text_tokens=text_tokens, dtype=dtype, device="cpu", steps=steps, pictures=1,
        threads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        seen: Watched = watch_stage(args, int(cap * 10**9), Path(folder))
    found: dict[str, Any] = {"size": f"{width}x{height}", "text_tokens": text_tokens, "dtype": dtype, "cap_gb": cap}
    if seen.error or len(seen.steps) < 3:
        return {**found, "error": seen.error or "the stage told of fewer than two steps"}
    cpu_s = [after.cpu_s - before.cpu_s for before, after in pairwise(seen.steps[1:])]
    blocks_s = [[block_s for _, block_s in step] for step in seen.blocks_s[1:]]
    best_s = [min(block) for block in zip(*blocks_s, strict=True)]
    others_s = min(whole - sum(blocks) for whole, blocks in zip(cpu_s, blocks_s, strict=True))
    step_s, predicted_s = sum(best_s) + others_s, seen.plan["step_s"]
    parts = {name: seen.plan[f"{name}_bytes"] for name in ("base", "scratch", "activation", "state")}
    return (
        found
        | parts
        | {
            "predicted_peak_bytes": seen.plan["peak_bytes"],
            "peak_bytes": seen.peak_anonymous_bytes,
            "peak_ratio": round(seen.plan["peak_bytes"] / seen.peak_anonymous_bytes, 3),
            "predicted_step_s": round(predicted_s, 3) if predicted_s else None,
            "step_cpu_s": round(step_s, 3),
            "blocks_cpu_s": [round(block_s, 4) for block_s in best_s],
            "others_cpu_s": round(others_s, 4),
            "step_ratio": round(predicted_s / step_s, 3) if predicted_s else None,
        }
    )


def main() -> None:
    """Run every point and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--points", default="", help="numbers of points, as 0,3; all by default")
    parser.add_argument("--repeat", type=int, default=1, help="how often to go through them")
    args = parser.parse_args()
    chosen = [int(word) for word in args.points.split(",") if word] or list(range(len(POINTS)))
    results: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for number in chosen * args.repeat:
        results[number].append(measure(args.path, POINTS[number], args.steps))
        print(results[number][-1], file=sys.stderr, flush=True)
    for number, runs in results.items():
        print(_summary(number, runs))
    print(json.dumps([run for runs in results.values() for run in runs]))


def _summary(number: int, runs: list[dict[str, Any]]) -> str:
    """One line of a point's runs: GB and seconds, planned and measured, and their ratios."""
    width, height, text_tokens, dtype, cap = POINTS[number]
    line = f"{width}x{height}, {text_tokens}, {dtype}, {cap} GB:"
    done = [run for run in runs if not run.get("error")]
    if len(done) < len(runs):
        line += f" {len(runs) - len(done)} failed;"
    if not done:
        return line
    planned, peaks = done[0]["predicted_peak_bytes"], [run["peak_bytes"] for run in done]
    line += f" {planned / 1e9:.3f} GB planned, {_range([peak / 1e9 for peak in peaks])} measured,"
    line += f" {planned / median(peaks):.2f};"
    predicted, steps = ([run[name] for run in done] for name in ("predicted_step_s", "step_cpu_s"))
    blocks_s = [min(block) for block in zip(*(run["blocks_cpu_s"] for run in done), strict=True)]
    best_s = sum(blocks_s) + min(run["others_cpu_s"] for run in done)
    line += f" {_range(predicted)} s planned, {_range(steps)} CPU s measured, {best_s:.2f} at best,"
    return f"{line} {min(predicted) / best_s:.2f}"


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    main()
