"""What one call for several previews saves over single calls, and kept prompts over encoding them again.

    python scripts/bench_preview.py                    # CPU seconds of the commands and of all their stages
    python scripts/bench_preview.py --count 8 --size 64x64 -- --model FILE --tokenizers DIR

Prints CPU seconds, not wall time: they do not depend on what else the machine does. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPT = "a large red circle above a small blue square on a white background"


def cpu_s(words: list[str], folder: Path) -> float:
    """CPU seconds of a command with its stages."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "FLUXSPLIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fluxsplit", *words, "--quiet"]
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Run the commands and print what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("more", nargs="*", help="further flags of fluxsplit, behind --")
    args = parser.parse_args()
    words = ["preview", "-p", PROMPT, "--size", args.size, *args.more]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        together = cpu_s([*words, "--seed", "1", "--count", str(args.count), "--no-cache"], folder)
        single = sum(cpu_s([*words, "--seed", str(seed), "--no-cache"], folder) for seed in range(1, args.count + 1))
        cpu_s([*words, "--seed", "1", "--out", "kept"], folder)  # fills the cache
        rerender = ["rerender", "kept/0001.png", *args.more]
        kept, encoded = cpu_s(rerender, folder), cpu_s([*rerender, "--no-cache"], folder)
    print(f"{args.count} previews of {args.size} in one call: {together:.1f} s of CPU")
    print(f"{args.count} calls for one each: {single:.1f} s of CPU, {single / together:.2f} times as much")
    print(f"rerender with the prompt kept: {kept:.1f} s of CPU; encoding it again: {encoded:.1f} s")
    print(json.dumps({"together_s": together, "single_s": single, "kept_s": kept, "encoded_s": encoded}))


if __name__ == "__main__":
    main()
