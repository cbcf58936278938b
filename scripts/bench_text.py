"""Measures the text encoders: peak anonymous memory, CPU seconds and disk reads of encoding with a full-size T5.

    python scripts/synthetic_checkpoint.py /tmp/t5xxl.safetensors --part t5          # 4.9 GB
    python scripts/bench_text.py /tmp/t5xxl.safetensors

It runs the product's own text stage in its own process and samples its RssAnon every 5 ms, imports included. CLIP and
the tokenizers are the demo model's unless named; prompts are padded to 256 tokens as always. On a card `--cap` is the
allocator's limit and the budget. Linux only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench import environment
from bench_watch import AnonymousPeak, drop_from_cache, usage
from fluxsplit.child_environment import child_environment
from fluxsplit.executor import StageProcess
from fluxsplit.jobs import TextJob
from fluxsplit.models import demo_files


def text_job(args: argparse.Namespace, folder: Path) -> TextJob:
    """Through the job that the command line would send."""
    demo = demo_files()
    t5_tokenizer = str(args.tokenizers / "t5xxl" / "tokenizer.json") if args.tokenizers else demo.t5_tokenizer
    return TextJob(
        prompts=tuple(f"a large red circle above {number} small blue squares" for number in range(args.prompts)),
        outputs=tuple(str(folder / f"{number}.safetensors") for number in range(args.prompts)),
        text_encoder=str(args.path.absolute()),
        clip=str(args.clip or demo.clip),
        t5_tokenizer=t5_tokenizer,
        clip_tokenizer=str(args.tokenizers / "clip_l") if args.tokenizers else demo.clip_tokenizer,
        device=args.device,
        vram=f"{args.cap:g}G" if args.cap else "auto",
    )


def measure(args: argparse.Namespace) -> dict[str, object]:
    """One run of the text stage over the file."""
    plans, told, prompts = [], [], args.prompts
    with tempfile.TemporaryDirectory() as folder:
        job, report = text_job(args, Path(folder)), Path(folder) / "report.json"
        stage_py = str(Path(__file__).parent / "bench_stage.py")
        command = [sys.executable, "-P", stage_py, "text", str(report), str(int(args.cap * 10**9))]
        with StageProcess("text", command, child_environment(environment(0), stage="text")) as stage:
            watch = AnonymousPeak(stage.pid)
            stage.submit(job)
            for event in stage.events():
                if event["event"] == "text":
                    told.append((event["done"], usage(stage.pid)))
                elif event["event"] in ("plan", "note"):
                    plans.append(event["text"])
            peak_bytes = watch.stop()
        shapes = {str(list(tensor)) for tensor in map(_t5_shape, job.outputs)}
        of_card = json.loads(report.read_text())
    began = told[0][1]
    t5_done = next(seen for done, seen in told if done == prompts)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "file_bytes": args.path.stat().st_size,
        "t5": ", ".join(sorted(shapes)),
        "peak_anonymous_bytes": peak_bytes,
        "prompts": prompts,
        "start_cpu_s": round(began.cpu_s, 2),
        "plan": plans,
        **of_card,
        "t5_s": round(t5_done.wall_s - began.wall_s, 2),
        "t5_cpu_s": round(t5_done.cpu_s - began.cpu_s, 2),
        "t5_disk_bytes": t5_done.disk_bytes - began.disk_bytes,
    }


def _t5_shape(path: str) -> torch.Size:

    shape: torch.Size = load_file(path)["t5"].shape
    return shape


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a weight file that holds a T5 encoder")
    parser.add_argument("--clip", type=Path)
    parser.add_argument("--tokenizers", type=Path, help="a folder with t5xxl/tokenizer.json and clip_l/")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cap", type=float, default=0.0, help="GB of a card; 0 for no cap")
    parser.add_argument("--cold", action="store_true", help="drop the file from the page cache before")
    args = parser.parse_args()
    if args.cold:
        drop_from_cache(args.path)
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
