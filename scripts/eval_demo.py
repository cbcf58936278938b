"""Renders prompts that training never saw with the product itself, and checks the pixels.

    python scripts/eval_demo.py                               # the demo model in the package
    python scripts/eval_demo.py --model unquantised.safetensors --pairs 400
    python scripts/eval_demo.py --checker                     # the checker alone, on pictures drawn from the prompts

Half of the prompts have one object, half two; twenty prompts share a seed. Prints a table and, last, one
line of JSON; writes a sheet of the first pictures for each size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from demo_check import contact_sheet, summarise, test_prompts
from shapes import Pixels, Scene, check, picture, to_pixels

PROMPTS_PER_SEED = 20
THRESHOLDS = {"background": 97.0, "colour": 92.0, "shape": 85.0, "relation": 75.0}


def rendered(pairs: list[tuple[str, Scene]], size: str, model: str | None, cfg: float) -> Iterator[Pixels]:
    """Pictures of the prompts, by `fluxsplit sample` and `fluxsplit decode`, in order."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = [] if model is None else ["--model", str(Path(model).absolute())]
        if model is not None:
            tokenizers = Path(__file__).resolve().parent.parent / "fluxsplit" / "demo" / "tokenizers"
            chosen += ["--tokenizers", str(tokenizers)]
        guided = ["--cfg", str(cfg)] if cfg != 1 else []
        latents: list[str] = []
        for first in range(0, len(pairs), PROMPTS_PER_SEED):
            prompts = Path(folder) / f"prompts-{first}.txt"
            prompts.write_text("\n".join(prompt for prompt, _ in pairs[first : first + PROMPTS_PER_SEED]) + "\n")
            words = ["--prompt-file", str(prompts), "--size", size, "--seed", str(1000 + first), *guided]
            latents += run(["sample", "--quiet", *words, *chosen], folder)
        vae = [] if model is None else ["--model", str(Path(model).absolute())]
        for path in run(["decode", "--quiet", *latents, *vae], folder):
            yield np.asarray(Image.open(path).convert("RGB"))


def run(words: list[str], folder: str) -> list[str]:
    """The paths that a fluxsplit command prints; its progress goes to stderr."""
    command = [sys.executable, "-m", "fluxsplit", *words]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def drawn(pairs: list[tuple[str, Scene]], size: str) -> Iterator[Pixels]:
    """Pictures as training draws them, for testing the checker."""
    width, height = (int(side) for side in size.split("x"))
    rng = np.random.default_rng(5)
    for _, scene in pairs:
        yield to_pixels(picture(scene, rng, width, height))


def main() -> None:
    """Parse the command line, render, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="weight file; default: the demo model in the package")
    parser.add_argument("--pairs", type=int, default=200, help="prompts for each size")
    parser.add_argument("--sizes", default="128x128,256x256,512x384")
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--checker", action="store_true", help="check drawn pictures instead of rendered ones")
    parser.add_argument("--sheets", type=Path, help="folder for a sheet of pictures of each size")
    args = parser.parse_args()
    table = {}
    for size in args.sizes.split(","):
        width, height = (int(side) for side in size.split("x"))
        pairs = test_prompts(args.pairs, "test", width * height + 1)
        source = drawn(pairs, size) if args.checker else rendered(pairs, size, args.model, args.cfg)
        pictures = list(source)
        scenes = [scene for _, scene in pairs]
        verdicts = [check(scene, pixels) for scene, pixels in zip(scenes, pictures, strict=True)]
        table[size] = summarise(scenes, verdicts)
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            contact_sheet(pictures[:40], 8, args.sheets / f"demo-{size}.png")
    names = list(next(iter(table.values())))
    print("| | " + " | ".join(table) + " | wanted |\n|---|" + "---|" * (len(table) + 1))
    for name in names:
        cells = " | ".join(f"{row[name]:.1f} %" for row in table.values())
        print(f"| {name} | {cells} | {THRESHOLDS.get(name, '')} |")
    print(json.dumps({"pairs": args.pairs, "cfg": args.cfg, "model": args.model, "sizes": table}))


if __name__ == "__main__":
    main()
