"""stable-diffusion.cpp over the same file by its own command line, on a CPU.

Run as a process of its own by `bench.py --sd-cli PATH`, with a program that was built from its sources; prints one JSON
line for each step, then exits. It gets a random CLIP and a random VAE, which it will not go without, and no T5, so that
the text is 256 tokens of zeros. It is ended before it decodes. All it says goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_watch import AnonymousPeak, usage

HERE = Path(__file__).parent
STEP = re.compile(rb"\| (\d+)/(\d+) - ")
"""What its progress bar says after each step."""


def make_parts(folder: Path) -> dict[str, Path]:
    """Files of random weights for what is not measured."""
    made = {part: folder / f"{part}.safetensors" for part in ("clip", "vae")}
    for part, path in made.items():
        command = [sys.executable, str(HERE / "synthetic_checkpoint.py"), str(path), "--part", part, "--dtype", "fp16"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return made


def command_of(args: argparse.Namespace, parts: dict[str, Path], picture: Path) -> list[str]:
    """Its command line."""
    size = ["-W", str(args.width), "-H", str(args.height), "--steps", str(args.steps), "--cfg-scale", "1.0"]
    files = ["--diffusion-model", str(args.path), "--clip_l", str(parts["clip"]), "--vae", str(parts["vae"])]
    how = ["--sampling-method", "euler", "-t", os.environ.get("OMP_NUM_THREADS", "-1"), "-p", "a", "-o", str(picture)]
    return [args.sd_cli, *files, *size, *how, *(["--type", args.type] if args.type else [])]


def watch(command: list[str], steps: int) -> int:
    """Run it and print a line for each step; returns 0 where all of them were seen."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    assert process.stdout is not None
    peak, seen, before, tail = AnonymousPeak(process.pid), 0, usage(process.pid), b""
    while seen < steps and (said := process.stdout.read(4096)):
        sys.stderr.buffer.write(said)
        tail = (tail + said)[-8192:]
        if any(int(done) == seen + 1 and int(total) == steps for done, total in STEP.findall(tail)):
            now = usage(process.pid)
            cpu_s, wall_s = now.cpu_s - before.cpu_s, now.wall_s - before.wall_s
            line = {"step_s": wall_s, "step_cpu_s": cpu_s, "own_peak_anonymous_bytes": peak.peak_bytes}
            print(json.dumps(line), flush=True)
            seen, before = seen + 1, now
    process.kill()
    process.wait()
    peak.stop()
    return 0 if seen == steps else 1


def main() -> int:
    """Make the parts, run, watch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--sd-cli", required=True)
    parser.add_argument("--type", default="", help="what it turns the weights into; its own choice is fp16")
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--text-tokens", type=int)
    parser.add_argument("--device")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return watch(command_of(args, make_parts(Path(folder)), Path(folder) / "picture.png"), args.steps)


if __name__ == "__main__":
    sys.exit(main())
