"""Measures sampling: memory, seconds a step and bytes moved for each budget, against the floor of the same machine.

    python scripts/synthetic_checkpoint.py /tmp/schnell.safetensors                  # 11.9 GB
    python scripts/bench.py /tmp/schnell.safetensors --size 256x256 --text-tokens 64
    python scripts/bench.py /tmp/schnell.safetensors --size 1152x944 --caps 12,8,6,4,2        # on a card
    python scripts/synthetic_checkpoint.py /tmp/short.safetensors --depth 2+4        # 1.3 GB, full width
    python scripts/bench.py /tmp/short.safetensors --threads 1 --peers diffusers --sd-cli build/bin/sd-cli
    python scripts/bench.py                                                          # float8 expansion alone

It runs the product's own sample stage in its own process, once for each cap, with a random conditioning, and watches
the process from outside: RssAnon every 5 ms from its start, imports included, CPU seconds at each step. On a card the
allocator is capped (`set_per_process_memory_fraction`) and `--vram` is the same number; on a CPU a cap is the budget
alone. The floor, max(compute, transfer), is measured in the same run with as many threads: the step's matrix products
without anything round them, the file read raw, and pinned memory copied to the card. On a CPU seconds that are
compared are CPU seconds, as wall seconds of a shared machine say little, unless a name has `wall`; the products are
measured before and after each run there, and their mean counts, as a machine may be a tenth slower a minute later.
`quiet` and, with `--between`, `beside` take steps apart, for a machine that others use. Linux only. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bench_watch import AnonymousPeak, Usage, drop_from_cache, usage
from fluxsplit import checkpoint
from fluxsplit.child_environment import child_environment
from fluxsplit.device import pick_device
from fluxsplit.errors import FluxsplitError
from fluxsplit.executor import StageProcess
from fluxsplit.jobs import ImageJob, ModelFiles, SampleJob

HERE = Path(__file__).parent
GB = 10**9
PLANNED = (
    "budget_bytes",
    "resident_bytes",
    "streamed_bytes",
    "fleeting_bytes",
    "slots",
    "spare_bytes",
    "pieces",
    "together",
    "query_chunk",
    "base_bytes",
    "scratch_bytes",
    "activation_bytes",
    "state_bytes",
    "peak_bytes",
    "step_s",
    "limit",
)
"""Of the plan that the stage tells: what is kept, besides how many blocks stay and stream."""

PRODUCTS = ("compute_s", "quiet_compute_s", "compute_wall_s")
"""What `bench_floor.py` says of a step's products."""


@dataclass(slots=True)
class Watched:
    """What was seen of one stage process."""

    peak_anonymous_bytes: int = 0
    steps: list[Usage] = field(default_factory=list)
    """Before the first step and after each."""
    moved_bytes: list[int] = field(default_factory=list)
    """Read for the card so far, after each step."""
    host: list[dict[str, float]] = field(default_factory=list)
    """`bench_stage.Host` after each step."""
    blocks_s: list[list[tuple[float, float]]] = field(default_factory=list)
    """Of each step what each block took by the clock and of the CPU; empty on a card."""
    between_s: tuple[float, float] = (0.0, 0.0)
    """By the clock and of the CPU, a step's products, made between the blocks; 0 where none were asked for."""
    pinned_bytes: int = 0
    """Of the file, in the page cache, after the last one."""
    plan: dict[str, Any] = field(default_factory=dict)
    of_card: dict[str, int] = field(default_factory=dict)
    """As bench_stage.py reports it; empty without one."""
    latents_sha256: list[str] = field(default_factory=list)
    error: str = ""


def watch_stage(args: argparse.Namespace, cap_bytes: int, folder: Path, between: Sequence[str] = ()) -> Watched:
    """Run the sample stage once under a cap (0: none), `between` its blocks as `bench_stage.py` says."""
    job, report = sample_job(args, cap_bytes, folder), folder / "report.json"
    command = [sys.executable, "-P", str(HERE / "bench_stage.py"), "sample", str(report), str(cap_bytes), *between]
    seen = Watched()
    with StageProcess("sample", command, child_environment(environment(args.threads), stage="sample")) as stage:
        watch = AnonymousPeak(stage.pid)
        stage.submit(job)
        try:
            for event in stage.events():
                if event["event"] in ("load", "step"):
                    take(seen, event, usage(stage.pid))
                elif event["event"] == "plan":
                    seen.plan = {name: event[name] for name in PLANNED}
                    seen.plan |= {name: len(event[name]) for name in ("resident", "streamed")}
                elif event["event"] == "result":
                    latents = load_file(event["path"])["latents"]
                    seen.latents_sha256.append(hashlib.sha256(latents.numpy().tobytes()).hexdigest()[:16])
                elif event["event"] == "failed":
                    seen.error = event["message"]
        except FluxsplitError as error:
            seen.error = error.message
        seen.peak_anonymous_bytes = watch.stop()
    if report.exists():  # not where the stage was killed
        seen.of_card = json.loads(report.read_text())
    return seen


def take(seen: Watched, event: dict[str, Any], now: Usage) -> None:
    """Keep the first usage as the start of the first step, then one for each step."""
    if not seen.steps or event["event"] == "step":
        seen.steps.append(now)
    if event["event"] == "step":
        seen.moved_bytes.append(event["moved_bytes"])
        seen.host.append(event["host"])
        seen.blocks_s.append(event["blocks_s"])
        seen.between_s = tuple(event["between_s"])
        seen.pinned_bytes = event["pinned_bytes"]


def sample_job(args: argparse.Namespace, cap_bytes: int, folder: Path) -> SampleJob:
    """One picture of random conditioning, through the job that the command line would send."""
    conditioning = folder / "conditioning.safetensors"
    if not conditioning.exists():
        random, part = torch.Generator().manual_seed(0), checkpoint.part(args.path, "transformer")
        t5_width = part.shape("context_embedder.weight")[1]
        pooled_width = part.shape("time_text_embed.text_embedder.linear_1.weight")[1]
        t5 = torch.randn(1, args.text_tokens, t5_width, generator=random) * 0.1
        save_file({"t5": t5, "pooled": torch.randn(1, pooled_width, generator=random)}, conditioning)
    width, height = args.size
    images = tuple(
        ImageJob("bench", str(conditioning), seed=seed, width=width, height=height, steps=args.steps)
        for seed in range(args.pictures)
    )
    budget: dict[str, Any] = {"vram": f"{cap_bytes / GB:g}G"} if cap_bytes else {}
    files = ModelFiles(str(args.path.absolute()))
    return SampleJob(images, files, str(folder / "out"), "safetensors", args.dtype, args.device, **budget)


def environment(threads: int) -> dict[str, str]:
    """The environment of what is measured: as many threads everywhere, this script's neighbours importable."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    limits = dict.fromkeys(names, str(threads)) if threads else {}
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    return {**os.environ, **limits, "PYTHONPATH": paths}


def row(args: argparse.Namespace, cap_bytes: int, seen: Watched, floor: dict[str, Any]) -> dict[str, Any]:
    """The figures of one cap; of the steps all but the first are warm."""
    found: dict[str, Any] = {"cap_gb": cap_bytes / GB or None, "peak_anonymous_bytes": seen.peak_anonymous_bytes}
    found |= seen.of_card | {"plan": seen.plan, "latents_sha256": seen.latents_sha256}
    if seen.error or len(seen.steps) < 3:
        return {**found, "error": seen.error or "the stage told of fewer than two steps"}
    pairs = list(zip(seen.steps, seen.steps[1:], strict=False))
    warm = pairs[1:]
    if args.between and is_cpu(args):  # memory and steps contain the products
        del found["peak_anonymous_bytes"]
        too_few = {} if any(seen.between_s) else {"error": "with so few steps not every product was made"}
        return found | too_few | {"disk_bytes_per_step": _disk_bytes(warm)} | by_block(args, seen, floor)
    wall_s = median(after.wall_s - before.wall_s for before, after in warm)
    cpu_s = median(after.cpu_s - before.cpu_s for before, after in warm)
    step_s = cpu_s if is_cpu(args) else wall_s
    moved_bytes = floor["weight_bytes"] if is_cpu(args) else seen.plan["streamed_bytes"]
    return found | {
        "first_step_s": round(pairs[0][1].wall_s - pairs[0][0].wall_s, 2),
        "step_s": round(wall_s, 3),
        "steps_s": [round(after.wall_s - before.wall_s, 3) for before, after in warm],
        "step_cpu_s": round(cpu_s, 2),
        "step_system_s": round(median(after.system_s - before.system_s for before, after in warm), 2),
        "disk_bytes_per_step": _disk_bytes(warm),
        "pinned_bytes": seen.pinned_bytes,
        "read_bytes_per_pass": round(median(b - a for a, b in pairwise(seen.moved_bytes))),
        "moved_bytes_per_s": round(moved_bytes / step_s),
        "host": {name: round(median(b[name] - a[name] for a, b in pairwise(seen.host)), 4) for name in seen.host[0]},
        "planned_over_measured_peak": round(seen.plan["peak_bytes"] / measured_bytes(args, seen), 3),
        "planned_over_measured_s": round(planned_s(args, seen.plan) / step_s, 3),
        "step_over_compute": round(step_s / (seen.plan["together"] * floor["compute_s"]), 3),
        "step_over_floor": round(step_s / floor_s(args, floor, seen.plan), 3),
        **by_the_clock(args, wall_s, _disk_bytes(warm), floor, seen.plan),
        **by_block(args, seen, floor),
    }


def _disk_bytes(warm: Sequence[tuple[Usage, Usage]]) -> int:
    return round(median(after.disk_bytes - before.disk_bytes for before, after in warm))


def by_the_clock(
    args: argparse.Namespace, wall_s: float, disk_bytes: int, floor: dict[str, Any], plan: dict[str, Any]
) -> dict[str, float]:
    """On a CPU, a step against the larger of its products alone and what came from the disk, all by the clock."""
    if not is_cpu(args):
        return {}
    disk_s = disk_bytes / floor["disk_bytes_per_s"]
    over = wall_s / max(plan["together"] * floor["compute_wall_s"], disk_s)
    return {"disk_s": round(disk_s, 3), "wall_over_floor": round(over, 3)}


def by_block(args: argparse.Namespace, seen: Watched, floor: dict[str, Any]) -> dict[str, float]:
    """Steps taken apart, on a CPU that others share: they slow it down for seconds at a time, and no step is without.

    `quiet` is a step made of what each block took at its best in any warm one, against the best of each product: of a
    single block there is nearly always one that went undisturbed, with one thread, and enough steps. `beside` is the
    mean of blocks against that of products made between them (`--between`), which met the same. In neither is the
    little that steps do between blocks. Nothing for a card, nor for several pictures, which take blocks in turns.
    """
    if not is_cpu(args) or args.pictures > 1:
        return {}
    blocks = list(zip(*seen.blocks_s[1:], strict=True))
    wall_s, cpu_s = (sum(min(taken[clock] for taken in block) for block in blocks) for clock in (0, 1))
    found = {
        "quiet_step_s": round(wall_s, 3),
        "quiet_step_cpu_s": round(cpu_s, 3),
        "quiet_step_over_compute": round(cpu_s / floor["quiet_compute_s"], 3),
    }
    if any(seen.between_s):
        wall_s, cpu_s = (sum(mean(taken[clock] for taken in block) for block in blocks) for clock in (0, 1))
        products_wall_s, products_cpu_s = seen.between_s
        found |= {"beside_step_s": round(wall_s, 3), "beside_step_cpu_s": round(cpu_s, 3)}
        found |= {"beside_products_s": round(products_wall_s, 3), "beside_products_cpu_s": round(products_cpu_s, 3)}
        found |= {"beside_step_over_compute": round(cpu_s / products_cpu_s, 3)}
        found |= {"beside_wall_over_compute": round(wall_s / products_wall_s, 3)}
    return found


def planned_s(args: argparse.Namespace, plan: dict[str, Any]) -> float:
    """The plan's seconds of a pass as they are measured: CPU seconds of all threads on a CPU. 0 where it names none."""
    threads = (args.threads or torch.get_num_threads()) if is_cpu(args) else 1
    return float((plan["step_s"] or 0) * plan["together"] * threads)


def measured_bytes(args: argparse.Namespace, seen: Watched) -> int:
    """The peak that a plan predicts: anonymous memory on a CPU, the allocator's on a card."""
    return seen.peak_anonymous_bytes if is_cpu(args) else seen.of_card["peak_device_reserved_bytes"]


def floor_s(args: argparse.Namespace, floor: dict[str, Any], plan: dict[str, Any]) -> float:
    """max(compute, transfer) of one pass: what streams is moved once, whatever the number of pictures in it."""
    rate = floor["disk_bytes_per_s"] if is_cpu(args) else floor["bus_bytes_per_s"]
    return max(float(plan["together"] * floor["compute_s"]), float(plan["streamed_bytes"] / rate))


def over_resident(args: argparse.Namespace, floor: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """On a card, each pass against max(the same with everything there, the bus), where one of the caps allows it."""
    whole = next((row["step_s"] for row in rows if "step_s" in row and not row["plan"]["streamed"]), None)
    if whole is None or is_cpu(args):
        return
    for row in rows:
        if "step_s" in row:
            transfer_s = row["plan"]["streamed_bytes"] / floor["bus_bytes_per_s"]
            row["step_over_resident_or_bus"] = round(
                row["step_s"] / max(whole * row["plan"]["together"], transfer_s), 3
            )


def is_cpu(args: argparse.Namespace) -> bool:
    """Whether it is the CPU that computes."""
    return pick_device(args.device).type == "cpu"


def python(args: argparse.Namespace, script: str, *more: str) -> tuple[list[dict[str, Any]], int, str]:
    """Run a neighbour over the same file; its JSON lines, peak of anonymous memory, and what it died of."""
    width, height = (str(side) for side in args.size)
    command = [sys.executable, str(HERE / script), str(args.path), "--width", width, "--height", height]
    command += ["--text-tokens", str(args.text_tokens), "--device", args.device, *more]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(args.threads)
        )
        watch = AnonymousPeak(process.pid)
        text, _ = process.communicate()
        peak_bytes = watch.stop()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return found, peak_bytes, last[:300] if process.returncode else ""


def measure_peers(args: argparse.Namespace, floor: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those that are asked for, one after the other."""
    if "diffusers" in args.peers:
        offloading = "no offloading on a CPU" if is_cpu(args) else "group offloading of one block with a stream"
        for more in ([], ["--layerwise"]):
            name = f"diffusers, {'layerwise casting, ' if more else ''}{offloading}"
            yield measure_peer(args, floor, name, "bench_peer.py", "--dtype", floor["dtype"], *more)
    for sd_type in ("", "bf16") if args.sd_cli and is_cpu(args) else ():
        more = ["--sd-cli", args.sd_cli, *(["--type", sd_type] if sd_type else [])]
        yield measure_peer(args, floor, f"stable-diffusion.cpp, {sd_type or 'fp16'}", "bench_sdcpp.py", *more)


def measure_peer(args: argparse.Namespace, floor: dict[str, Any], name: str, script: str, *more: str) -> dict[str, Any]:
    """Another program over the same file, size and number of threads."""
    steps, peak_bytes, error = python(args, script, "--steps", str(args.steps), *more)
    found: dict[str, Any] = {"peer": name, "peak_anonymous_bytes": peak_bytes}
    if error or len(steps) < 2:
        return {**found, "error": error}
    if "own_peak_anonymous_bytes" in steps[-1]:  # a process of its own, which the script watches
        found["peak_anonymous_bytes"] = steps[-1]["own_peak_anonymous_bytes"]
    found |= {f"peak_device_{name}_bytes": steps[-1][name] for name in ("allocated", "reserved") if name in steps[-1]}
    cpu_s, wall_s = (median(step[name] for step in steps[1:]) for name in ("step_cpu_s", "step_s"))
    over = (cpu_s if is_cpu(args) else wall_s) / floor["compute_s"]
    return {**found, "step_s": round(wall_s, 3), "step_cpu_s": round(cpu_s, 2), "step_over_compute": round(over, 3)}


def alone(device: torch.device) -> dict[str, Any]:
    """The device's name and its float8 expansion, by a process that is gone before others need the card's memory."""
    command = [sys.executable, str(HERE / "bench_fp8.py"), str(device)]
    found: dict[str, Any] = json.loads(subprocess.check_output(command, text=True, env=environment(1)))
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as it goes to the last line."""
    device = pick_device(args.device)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        **alone(device),
        "threads": args.threads or torch.get_num_threads(),
    }
    print(f"float8 e4m3fn to bf16: {result['fp8']['e4m3fn to bf16']}", file=sys.stderr)
    if args.path is None:
        return result
    floor = floor_of(args)
    print(f"floor: {floor}", file=sys.stderr)
    result |= {"size": "x".join(map(str, args.size)), "steps": args.steps, "pictures": args.pictures, "floor": floor}
    result["budgets"] = rows = [one_budget(args, int(cap * GB), floor) for cap in args.caps]
    over_resident(args, floor, rows)
    sampled = {str(found["latents_sha256"]) for found in rows if not found.get("error")}
    result["same_bits_at_every_cap"] = len(sampled) == 1
    result["peers"] = []
    for peer in measure_peers(args, floor):
        result["peers"].append(peer)
        print(f"peer: {peer}", file=sys.stderr)
    return result


def floor_of(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What `bench_floor.py` says; with `--products` no more than the products' seconds."""
    floors, _, error = python(args, "bench_floor.py", "--dtype", args.dtype, *more)
    if error:
        raise SystemExit(f"the floor could not be measured: {error}")
    return floors[0]


def one_budget(args: argparse.Namespace, cap_bytes: int, floor: dict[str, Any]) -> dict[str, Any]:
    """One run of the stage, on a CPU between two of its products alone."""
    if args.cold:
        drop_from_cache(args.path)
    before = floor_of(args, "--products") if is_cpu(args) else floor
    with tempfile.TemporaryDirectory() as folder:
        products = (str(args.path), *(str(floor[name]) for name in ("image_tokens", "text_tokens", "dtype")))
        seen = watch_stage(args, cap_bytes, Path(folder), products if args.between and is_cpu(args) else ())
    after = floor_of(args, "--products") if is_cpu(args) else floor
    alone_s = {name: [run[name] for run in (before, after)] for name in PRODUCTS}
    floor = floor | {name: (min if name.startswith("quiet") else mean)(runs) for name, runs in alone_s.items()}
    found = row(args, cap_bytes, seen, floor) | {f"products_{name}": runs for name, runs in alone_s.items()}
    print(f"cap {cap_bytes / GB:g} GB: {found}", file=sys.stderr)
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, nargs="?", help="a weight file that holds a transformer")
    parser.add_argument("--caps", type=numbers, default=[0.0], help="GB, as 12,8,6,4,2; 0 (the default) for no cap")
    parser.add_argument("--size", type=sides, default=(512, 512))
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=1, help="sampled together in each pass")
    parser.add_argument("--threads", type=int, default=0, help="0 for torch's own choice")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=[], metavar="diffusers")
    parser.add_argument("--sd-cli", metavar="PATH", help="stable-diffusion.cpp's program, a peer on a CPU")
    parser.add_argument(
        "--between",
        action="store_true",
        help="on a CPU, make a product after each block, to compare with the blocks and nothing else; 7 steps or more",
    )
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before each run")
    return parser.parse_args()


def numbers(text: str) -> list[float]:
    """`12,8,6` as numbers."""
    return [float(part) for part in text.split(",")]


def sides(text: str) -> tuple[int, int]:
    """`1152x944` as width and height."""
    width, _, height = text.partition("x")
    return int(width), int(height)


if __name__ == "__main__":
    print(json.dumps(measure(parse())))
