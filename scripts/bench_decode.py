"""Measures the exact strip decode beside diffusers' own, each case in a process of its own.

    python scripts/bench_decode.py                                    # 512x512 and 944x1152, minutes of CPU
    python scripts/bench_decode.py --sizes 2048x2048 --cases strips-disk
    python scripts/bench_decode.py --plan                             # ten points of plan against peak
    python scripts/bench_decode.py --sizes 256x256 --dtypes fp32 --cases stock strips-ram tiles-192 tiles-128
    python scripts/bench_decode.py --sizes 256x256 --cases strips-ram tiles-192 tiles-128 --maps errors.png
    python scripts/bench_decode.py --caps 1,2,4 --sizes 1152x944 2048x2048 4096x4096     # on a graphics card, GB

The VAE has the real sizes and random weights, whose spread of 1 / sqrt(inputs) keeps every activation in range; made
by synthetic_checkpoint.py where `--vae` is not there. Peaks are of RssAnon, sampled every 5 ms, above what the process
held when torch was imported and the weight file open; on a card those of torch's allocator. CPU seconds are the
process's own; on a busy machine compare ratios within one run, and take one thread (the default), since threads that
wait for one another count as busy. Every case is one JSON line on stdout. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import synthetic_checkpoint
from fluxsplit import checkpoint
from fluxsplit.child_environment import child_environment
from fluxsplit.decode_plan import DTYPE_BYTES, VaePlan, device_peak, plan_vae
from fluxsplit.device import device_info
from fluxsplit.errors import FluxsplitError
from fluxsplit.planes import spill_folder
from fluxsplit.tiled_vae import TiledVae
from fluxsplit.vae import Vae, load_vae
from fluxsplit.weights import WeightFiles

CASES = ("stock", "strips-ram", "strips-disk", "tiles-1024", "tiles-512")
RAM_BUDGET_BYTES, DISK_BUDGET_BYTES = 64_000_000_000, 250_000_000
PLAN_POINTS = [("256x256", "fp32", "strips-ram"), ("256x256", "fp32", "strips-disk")]
PLAN_POINTS += [
    (s, d, c) for s in ("512x512", "1152x944") for d in ("fp32", "bf16") for c in ("strips-ram", "strips-disk")
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Peak:
    """The largest RssAnon of this process since it was made, above what it was then."""

    def __init__(self) -> None:
        self.base_bytes = self.peak_bytes = self._now()
        self._watching = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Bytes above the base."""
        self._watching = False
        self._thread.join()
        return self.peak_bytes - self.base_bytes

    def _watch(self) -> None:
        while self._watching:
            self.peak_bytes = max(self.peak_bytes, self._now())
            time.sleep(0.005)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def latents_of(width: int, height: int) -> torch.Tensor:
    """The same normal latents [1, 16, height / 8, width / 8] in every process."""
    return torch.randn(1, 16, height // 8, width // 8, generator=torch.Generator().manual_seed(0))


def planned(vae: Vae, latents: torch.Tensor, case: str, dtype: str, cap_bytes: int) -> VaePlan:
    """The plan that the product makes for this budget; `strips-disk` spills however small the picture is."""
    on_cpu = vae.device.type == "cpu"
    budget = cap_bytes or (DISK_BUDGET_BYTES if case == "strips-disk" else RAM_BUDGET_BYTES)
    passes = vae.decoder_passes(latents.shape[2], latents.shape[3])
    plan = plan_vae(passes, dtype, budget, device_info(vae.device))
    if case == "strips-disk":
        peak = device_peak(passes, plan.strip_bytes, DTYPE_BYTES[dtype], "disk", on_cpu=on_cpu)
        plan = replace(plan, home="disk", device_bytes=peak, kept_blocks=0)
    return plan


@contextmanager
def measured(device: torch.device, result: dict[str, Any]) -> Iterator[None]:
    """CPU and wall seconds and the peak of what runs inside."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    peak, cpu_s, wall_s = Peak(), time.process_time(), time.monotonic()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    result |= {"cpu_s": round(time.process_time() - cpu_s, 2), "wall_s": round(time.monotonic() - wall_s, 2)}
    result["peak_anonymous_bytes"] = peak.stop()
    result["before_bytes"] = peak.base_bytes
    if device.type == "cuda":
        result["peak_device_bytes"] = torch.cuda.max_memory_reserved(device)
        result["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(device)


def run_case(args: argparse.Namespace) -> dict[str, Any]:
    """One case in this process; the picture [H, W, 3] in -1..1 goes to `args.keep`."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    vae = load_vae(checkpoint.part(args.vae, "vae"), WeightFiles(), device)
    width, height = map(int, args.sizes[0].split("x"))
    latents, case, dtype = latents_of(width, height), args.cases[0], args.dtypes[0]
    result: dict[str, Any] = {"case": case, "size": args.sizes[0], "dtype": dtype, "threads": args.threads}
    if args.cap:
        torch.cuda.set_per_process_memory_fraction(args.cap * 1e9 / device_info(device).total_bytes, device)
        result["cap_gb"] = args.cap
    if case.startswith("strips"):
        picture = torch.empty((height, width, 3), dtype=torch.uint8 if args.no_keep else torch.float32)
        plan = planned(vae, latents, case, dtype, int(args.cap * 1e9))
        result |= {"plan": plan.text(), "home": plan.home, "plan_bytes": plan.device_bytes}

        def sink(start: int, rows: torch.Tensor) -> None:
            picture[start : start + len(rows)].copy_(rows if not args.no_keep else rows.float().clamp(-1, 1) * 127)

        with measured(device, result):
            vae.decode_rows(latents, plan, sink, folder=spill_folder({"TMPDIR": args.spill}))
    else:
        stock = TiledVae(vae, dtype)
        with measured(device, result):
            picture = stock.values(latents, int(case.partition("-")[2] or 0))
    if not args.no_keep:
        torch.save(picture.float().cpu().clone(), args.keep / f"{case}-{args.sizes[0]}-{dtype}.pt")
    return result


def in_a_process(args: argparse.Namespace, size: str, dtype: str, case: str, cap: float = 0) -> dict[str, Any]:
    """`run_case` in a process of its own; its result with errors against the kept stock fp32 picture."""
    words = [sys.executable, __file__, "--vae", str(args.vae), "--threads", str(args.threads), "--device", args.device]
    words += ["--keep", str(args.keep), "--sizes", size, "--dtypes", dtype, "--cases", case, "--alone"]
    words += ["--spill", args.spill, *(["--no-keep"] if args.no_keep else []), *(["--cap", str(cap)] if cap else [])]
    environment = (
        None if case == "stock" else child_environment(os.environ, stage="decode")
    )  # as the product starts its stages
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"case": case, "size": size, "dtype": dtype, "failed": last[:300]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    whole = args.keep / f"stock-{size}-fp32.pt"
    if whole.exists() and not args.no_keep:
        error = torch.load(args.keep / f"{case}-{size}-{dtype}.pt") - torch.load(whole)
        result |= {"max_error": float(error.abs().max()), "mean_error": float(error.abs().mean())}
    return result


def on_a_card(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every size: diffusers' decode without a cap, then strips under each; in this process, as importing takes longer.

    Errors are those against diffusers' in fp32, on the card as well; with `--no-keep` there is neither.
    """
    cases = [(cap, "strips-ram") for cap in map(float, args.caps.split(","))]
    if not args.no_keep:
        cases.insert(0, (0.0, "stock"))
    for size in args.sizes:
        whole = None
        for cap, case in cases:
            for dtype in args.dtypes:
                one = argparse.Namespace(
                    **{**vars(args), "sizes": [size], "dtypes": [dtype], "cases": [case], "cap": cap}
                )
                result, picture = on_a_card_once(one)
                whole = picture if case == "stock" and dtype == "fp32" else whole
                if picture is not None and whole is not None:
                    error = (picture - whole).abs()
                    result |= {"max_error": float(error.max()), "mean_error": float(error.mean())}
                yield result


def on_a_card_once(args: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor | None]:
    """One case and its picture; none where it failed."""
    torch.cuda.empty_cache()
    try:
        result = run_case(args)
    except (RuntimeError, FluxsplitError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        return {"case": args.cases[0], "size": args.sizes[0], "dtype": args.dtypes[0], "failed": first}, None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    kept = args.keep / f"{args.cases[0]}-{args.sizes[0]}-{args.dtypes[0]}.pt"
    return result, None if args.no_keep else torch.load(kept)


def say(result: dict[str, Any]) -> None:
    """A JSON line, at once."""
    print(json.dumps(result), flush=True)


def check_plans(args: argparse.Namespace) -> None:
    """Peak against plan at ten points."""
    for size, dtype, case in PLAN_POINTS:
        result = in_a_process(args, size, dtype, case)
        if "plan_bytes" in result:
            plan, peak, before = (result[f"{name}_bytes"] for name in ("plan", "peak_anonymous", "before"))
            result["plan_over_peak"] = round(plan / peak, 3)
            result["plan_over_peak_with_imports"] = round((plan + before) / (peak + before), 3)
        say(result)


def draw_maps(args: argparse.Namespace) -> None:
    """Errors of strips and tiles side by side, in levels of 255, from pictures that are kept already."""
    size = args.sizes[-1]
    whole = torch.load(args.keep / f"stock-{size}-fp32.pt")
    panels = []
    for case in args.cases:
        title = case.replace("strips-ram", "exact strips").replace("tiles-", "tiles of ")
        error = (torch.load(args.keep / f"{case}-{size}-fp32.pt") - whole).abs().amax(2) * 127.5
        image = Image.fromarray((error * 8).clamp(0, 255).to(torch.uint8).numpy())
        panel = Image.new("L", (image.width, image.height + 24), 255)
        panel.paste(image, (0, 24))
        text = f"{title}: up to {float(error.max()):.2g} of 255 levels"
        ImageDraw.Draw(panel).text((6, 6), text, fill=0)
        panels.append(panel)
    sheet = Image.new("L", (sum(panel.width + 8 for panel in panels) - 8, panels[0].height), 255)
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number * (panel.width + 8), 0))
    sheet.save(args.maps, optimize=True)


def main() -> None:
    """Parse the command line, run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=Path("/tmp/fluxsplit-bench/vae.safetensors"))
    parser.add_argument("--keep", type=Path, default=Path("/tmp/fluxsplit-bench"), help="folder for the pictures")
    parser.add_argument("--spill", default="", help="folder for spilled activations")
    parser.add_argument("--sizes", nargs="+", default=["512x512", "1152x944"], metavar="WxH")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="stock, strips-ram, strips-disk, tiles-N")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-keep", action="store_true", help="no picture in fp32: its own bytes would count")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--maps", type=Path)
    parser.add_argument("--caps", default="", help="GB, with commas, on a graphics card")
    parser.add_argument("--cap", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    if not args.vae.exists():
        synthetic_checkpoint.write(args.vae, synthetic_checkpoint.vae_shapes(synthetic_checkpoint.Dimensions()), "fp32")
    if args.alone:
        say(run_case(args))
    elif args.plan:
        check_plans(args)
    elif args.maps:
        draw_maps(args)
    elif args.caps:
        args.device = "cuda:0" if args.device == "cpu" else args.device
        os.environ.update(child_environment(os.environ, stage="decode"))  # read when the card is first used
        for result in on_a_card(args):
            say(result)
    else:
        for size in args.sizes:
            for dtype in args.dtypes:
                for case in args.cases:
                    say(in_a_process(args, size, dtype, case))


if __name__ == "__main__":
    main()
