"""How long `fluxsplit info --json` takes for many pictures in one call, in seconds of CPU and of the clock.

python scripts/bench_info.py --pictures 1000
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks
from fluxsplit.recipe import WeightsStamp
from gallery_pictures import make_recipe


def record(seed: int) -> ImageRecord:
    """A recipe of a usual size."""
    prompt = "a lighthouse at dusk, storm clouds, oil on canvas " * 8
    return ImageRecord(make_recipe(prompt, seed, 512, 512), "cd" * 32, WeightsStamp("ae.safetensors", "ab" * 32))


def main() -> None:
    """Write pictures, read them with one command, print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pixels = bytes(range(256)) * (512 * 512 * 3 // 256)
        names = []
        for seed in range(args.pictures):
            path = Path(folder) / f"{seed:05}.png"
            path.write_bytes(encode_png(pixels, 512, 512, png_text_chunks(record(seed))))
            names.append(str(path))
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = [sys.executable, "-m", "fluxsplit", "info", "--json", *names]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        wall_s, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        lines = len(done.stdout.splitlines())
    print(json.dumps({"pictures": args.pictures, "lines": lines, "wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2)}))


if __name__ == "__main__":
    main()
