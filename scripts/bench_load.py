"""Measures loading and stepping a full-size transformer: anonymous memory, seconds, and the disk's own speed.

    python scripts/synthetic_checkpoint.py /tmp/schnell.safetensors
    python scripts/bench_load.py /tmp/schnell.safetensors

It runs the real sample stage in its own process with a random conditioning and samples the process's RssAnon. The
file is dropped from the page cache first, so the first step reads it from the disk and the second has it in the
cache; the difference is what loading costs, to be held against reading the same file from end to end. The last
line is JSON. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from fluxsplit.executor import StageProcess
from fluxsplit.jobs import ImageJob, ModelFiles, SampleJob

READ_BYTES = 8 << 20


class AnonymousPeak:
    """The largest RssAnon of a process, looked at every 10 ms."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            now = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
            if not now:
                return
            self.peak_bytes = max(self.peak_bytes, now[0])
            time.sleep(0.01)


def drop_from_cache(path: Path) -> None:
    """Ask the kernel to forget the file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(path: Path) -> float:
    """Seconds to read the file from end to end, cold."""
    drop_from_cache(path)
    buffer = bytearray(READ_BYTES)
    started = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            continue
    return time.monotonic() - started


def run(path: Path, size: int, text_tokens: int, steps: int, dtype: str) -> dict[str, object]:
    """One run of the sample stage over the file; seconds for each step and the peak of anonymous memory."""
    with tempfile.TemporaryDirectory() as folder:
        conditioning = Path(folder) / "conditioning.safetensors"
        generator = torch.Generator().manual_seed(0)
        t5 = torch.randn(1, text_tokens, 4096, generator=generator) * 0.1
        save_file({"t5": t5, "pooled": torch.randn(1, 768, generator=generator)}, conditioning)
        image = ImageJob("synthetic", str(conditioning), seed=0, width=size, height=size, steps=steps)
        job = SampleJob((image,), ModelFiles(str(path)), str(Path(folder) / "out"), "pt", dtype, "auto")
        started = time.monotonic()
        step_s: list[float] = []
        with StageProcess("sample") as stage:
            watch = AnonymousPeak(stage.pid)
            stage.submit(job)
            for event in stage.events():
                if event["event"] == "step":
                    step_s.append(round(event["step_s"], 2))
        return {
            "peak_anonymous_bytes": watch.peak_bytes,
            "first_step_s": step_s[0],
            "warm_step_s": step_s[-1],
            "whole_s": round(time.monotonic() - started, 2),
        }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--text-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    file_bytes = args.path.stat().st_size
    disk_s = read_seconds(args.path)
    drop_from_cache(args.path)
    result = run(args.path, args.size, args.text_tokens, args.steps, args.dtype)
    load_s = max(0.0, float(str(result["first_step_s"])) - float(str(result["warm_step_s"])))
    result |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "file_bytes": file_bytes,
        "disk_s": round(disk_s, 2),
        "disk_bytes_per_s": round(file_bytes / disk_s),
        "load_s": round(load_s, 2),
        "load_over_disk": round(load_s / disk_s, 2),
    }
    print(f"anonymous peak {result['peak_anonymous_bytes']:,} bytes; loading costs {load_s:.1f} s, ", end="")
    print(f"reading the file {disk_s:.1f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
